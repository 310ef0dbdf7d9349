"""The digits ResNet quantized with real images, with images made of the net, and with noise.

    python tests/benchmarks/data_free.py                         seeds 0, 1 and 2
    python tests/benchmarks/data_free.py 0                       these seeds
    python tests/benchmarks/data_free.py --iterations 1000       with the default number of steps

First table: accuracy on 500 held-out images in percent, mean and range of the seeds. int8 has
static activations; int4 is GPTQ with one scale per output channel; both behind
cleanup.fold_batch_norm. Second table: distance of the batch statistics from the running ones at
every batch norm, ||v - rv|| + ||m - rm||, mean of the seeds.

`made` is P25: from noise, without flips. `adjusted` is P72: from those images on, with a teacher of
its own for every 32 of them, variances weighted 11 times, crops of any size. All sources have as
many images.
"""

from __future__ import annotations

import argparse
from statistics import fmean

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.synthesis.images import synthesize
from graphwright.ir.synthesis.options import SynthesisOptions, WeightAdjust
from graphwright.ir.synthesis.source import as_data
from graphwright.ir.synthesis.statistics import distances_per_norm
from graphwright.passes.cleanup import FoldBatchNorm
from graphwright.passes.quantize import Gptq, Int8

SOURCES = ("real", "made", "adjusted", "noise")


def sources(program: gw.Program, seed: int, images: int, iterations: int) -> dict[str, Tensor]:
    """Images by the name of where they come from."""
    context = Context(seed=seed)
    plain = {"iterations": iterations, "flip": False, "mean": (0.0,), "std": (1.0,)}
    made = synthesize(program, images, SynthesisOptions(**plain), context)
    own = SynthesisOptions(
        **plain, batch=32, milestone=0.0, variance_weight=11.0, weight_adjust=WeightAdjust()
    )
    adjusted, _ = synthesize(program, images, own, context, start=made)
    noise = torch.randn(made[0].shape, generator=torch.Generator().manual_seed(seed))
    return {"real": digits.data()[0][:images], "made": made[0], "adjusted": adjusted,
            "noise": noise}  # fmt: skip


def accuracies(program: gw.Program, images: Tensor) -> tuple[float, float]:
    """Of the int8 and of the int4 net that were calibrated on these images."""
    folded = FoldBatchNorm()(program)
    data = as_data({program.signature.inputs[0].name: images}, folded, "images", 32)
    steps = (Int8(activations="static"), Gptq(bits=4, group_size=-1))
    int8, int4 = (step.execute(folded, Context(calibration=data)).program for step in steps)
    return digits.accuracy(int8), digits.accuracy(int4)


def spread(values: list[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * fmean(values):.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SOURCES}
    distances: dict[str, dict[str, list[float]]] = {}
    floats = []
    for seed in arguments.seeds:
        program = digits.traced(digits.trained("resnet", seed))
        floats.append(digits.accuracy(program))
        made = sources(program, seed, arguments.images, arguments.iterations)
        for name, images in made.items():
            found[name].append(accuracies(program, images))
            for norm, value in distances_per_norm(program, images).items():
                distances.setdefault(norm, {}).setdefault(name, []).append(value)
    print(f"\nIn float: {spread(floats)}\n")
    print("| calibrated on | int8 | int4 |\n| --- | ---: | ---: |")
    for name, pairs in found.items():
        int8, int4 = (list(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {spread(int8)} | {spread(int4)} |")
    print(f"\n| batch norm | {' | '.join(SOURCES)} |\n| --- |{' ---: |' * len(SOURCES)}")
    for norm, values in distances.items():
        print(f"| `{norm}` | {' | '.join(f'{fmean(values[n]):.2f}' for n in SOURCES)} |")


if __name__ == "__main__":
    main()
