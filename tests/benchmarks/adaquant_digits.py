"""Few bits for weights and inputs on digits: min-max rounding against AdaQuant and its company.

    python tests/benchmarks/adaquant_digits.py [--nets resnet,vit] [--seeds 3] [--bits 4,3]

Accuracy on 500 held-out images, mean over seeds. Every layer is quantized, weights per channel and
inputs per tensor. `min-max` is rounding with ranges from 256 calibration images. `AdaQuant` lets
every layer learn; `+ BN tuning` re-estimates the folded norms (nets without batch norm: bias
correction); `bit allocation` gives 8 bits to some layers, a fifth more bits than the fewest.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.program import Program
from graphwright.passes.registry import find_pass

IMAGES = 256
LEARN: dict[str, Any] = {"iterations": 400, "lr": 1e-4}


def apply(program: Program, id: str, original: Program, batches: Any, **options: Any) -> Program:
    """One pass, unchecked, with the float net as its teacher."""
    context = Context(calibration=batches, teacher=original)
    return find_pass(id)(**options).execute(program, context).program


def tuned(program: Program, original: Program, batches: Any) -> Program:
    """Norm statistics where norms were folded, biases elsewhere."""
    has_norms = bool(original.facts.get("cleanup.fold_batch_norm"))
    id = "quantize.bn_tuning" if has_norms else "compensate.bias_correction"
    return apply(program, id, original, batches)


def accuracies(name: str, seed: int, bits: int) -> dict[str, float]:
    """Held-out accuracy by recipe, in percent."""
    program = digits.traced(digits.trained(name, seed))
    program = gw.passes.cleanup.FoldBatchNorm()(program)
    images = digits.data()[0][:IMAGES]
    batches = [(part,) for part in images.split(64)]
    few = {"bits": bits, "activation_bits": bits}
    plain = apply(program, "quantize.adaquant", program, batches, **few, iterations=0)
    learned = apply(program, "quantize.adaquant", program, batches, **few, **LEARN)
    mixed = apply(
        program, "quantize.bit_allocation", program, batches, bits=[8, bits], activations=True,
        budget=1.2 * bits / 32, options=LEARN,
    )  # fmt: skip
    made = {
        "float32": program,
        "min-max": plain,
        "min-max + BN tuning": tuned(plain, program, batches),
        "AdaQuant": learned,
        "AdaQuant + BN tuning": tuned(learned, program, batches),
        "AdaQuant + bit allocation": mixed,
        "AdaQuant + bit allocation + BN tuning": tuned(mixed, program, batches),
    }
    return {recipe: 100 * digits.accuracy(found) for recipe, found in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", default="resnet,vit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", default="4,3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    widths = [int(bits) for bits in options.bits.split(",")]
    for name in options.nets.split(","):
        found = {
            bits: [accuracies(name, seed, bits) for seed in range(options.seeds)] for bits in widths
        }
        print(
            f"\n| {name}, {options.seeds} seeds | " + " | ".join(f"{b} bits" for b in widths) + " |"
        )
        print("| --- |" + " ---: |" * len(widths))
        for recipe in found[widths[0]][0]:
            cells = [f"{mean(run[recipe] for run in found[bits]):.2f}" for bits in widths]
            print(f"| {recipe} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
