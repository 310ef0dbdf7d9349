"""Static int8 of convolutional nets on ONNX Runtime beside float32: kernels, accuracy, speed.

    python tests/benchmarks/int8_convolutions.py          seeds 0, 1 and 2
    python tests/benchmarks/int8_convolutions.py 0        these seeds

Both sessions in turn, call by call, batches of 8; times that a tenth of the calls of all seeds stay
below, for a machine that is busy delays single calls. `any_cpu`
is the default; `any_cpu: false` gives the codes that only CPUs with VNNI compute exactly. The first
table is what holding codes costs in rounding error: 4 would be one bit. Its seconds are CPU time.
"""

from __future__ import annotations

import sys
import time
from statistics import fmean, quantiles

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import int8_nets

import graphwright as gw
from graphwright.backends.base import Compiled
from graphwright.passes.cleanup import FoldBatchNorm
from graphwright.passes.quantize import Int8
from graphwright.passes.quantize._math.int8 import along, quantize_weight

CALLS = 200
CALIBRATION = 256


def lowered(program: gw.Program, any_cpu: bool, x: torch.Tensor) -> Compiled:
    """The program in static int8."""
    batches = [(part,) for part in x[:CALIBRATION].split(32)]
    quantized = Int8(activations="static", any_cpu=any_cpu)(program, calibration=batches)
    return gw.lower(quantized, "onnxruntime")


def milliseconds(models: list[Compiled], x: torch.Tensor) -> list[list[float]]:
    """Times of every model's calls, in turn."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(CALLS):
        for model, times in zip(models, found, strict=True):
            start = time.perf_counter()
            model(x)
            times.append(1e3 * (time.perf_counter() - start))
    return found


def costs() -> None:
    """What holding pairs of codes costs in squared rounding error, and the seconds it takes."""
    print("| weights | squared error of `any_cpu` over that without | seconds without | with |")
    print("| --- |" + " ---: |" * 3)
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 64, 3, 3), (1024, 1024), (4096, 4096)):
        for kind, draw in (("normal", torch.randn), ("even", torch.rand)):
            w = draw(shape, generator=generator)
            w = w - w.mean() if kind == "even" else w
            errors, seconds = [], []
            for hold_pairs in (False, True):
                start = time.process_time()
                codes, scale = quantize_weight(w, 0, hold_pairs=hold_pairs)
                seconds.append(time.process_time() - start)
                errors.append(float((codes * along(scale, 0, w.dim()) - w).square().sum()))
            sizes = " x ".join(map(str, shape))
            print(f"| {sizes}, {kind} | {errors[1] / errors[0]:.2f} | {seconds[0]:.2f} "
                  f"| {seconds[1]:.2f} |", flush=True)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    costs()
    print()
    seeds = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
    print("| net | integer kernels | float32 | int8 | `any_cpu: false` | float32, ms | int8, ms |")
    print("| --- |" + " ---: |" * 6)
    for name in ("resnet", "unet"):
        rows: list[list[float]] = []
        times: list[list[float]] = [[], []]
        kernels = set()
        for seed in seeds:
            model = int8_nets.trained(name, seed)
            x, _ = int8_nets.samples(name, test=False)
            x_test, y_test = int8_nets.samples(name, test=True)
            program = FoldBatchNorm()(gw.trace(model, (x[:8],), {"x": {0: "n"}}))
            plain = gw.lower(program, "onnxruntime")
            held, free = (lowered(program, any_cpu, x) for any_cpu in (True, False))
            counts = held.notes["integer_kernels"]
            kernels.add(f"{counts['integer']} of {counts['quantized']}")
            rows.append([int8_nets.accuracy(c(x_test), y_test) for c in (plain, held, free)])
            for all_times, some in zip(times, milliseconds([plain, held], x[:8]), strict=True):
                all_times += some
        shares = " | ".join(f"{100 * fmean(column):.2f}%" for column in zip(*rows, strict=True))
        before, after = (quantiles(some, n=10)[0] for some in times)
        print(f"| {name} | {', '.join(kernels)} | {shares} | {before:.2f} | {after:.2f} "
              f"({before / after:.2f}x) |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
