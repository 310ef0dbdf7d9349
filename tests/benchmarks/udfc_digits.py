"""UDFC on digits beside pruning alone and Neuron Merging: accuracy without data.

    python tests/benchmarks/udfc_digits.py            seeds 0, 1 and 2
    python tests/benchmarks/udfc_digits.py 0          these seeds

Means over the seeds of the accuracy on 500 held-out images, in percent; one rule for the channels
that go, and one kind of grid, in every column. `none` is pruning and rounding alone, `merge` Neuron
Merging with the published settings (rounding is not repaired by it), the rest UDFC; `auto` is the
default.
"""

from __future__ import annotations

import sys
from statistics import fmean

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits

from graphwright.ir.context import Context
from graphwright.passes.prune import Udfc

RUNS = ((0.1, None), (0.3, None), (0.3, 6), (0.3, 4), (0.0, 4), (0.0, 3), (0.5, None))
"""Share of the channels that goes, and bits of the weights."""
REPAIRS = ("none", "merge", "ridge", "nonneg", "features", "auto")


def main() -> None:
    torch.set_num_threads(1)
    seeds = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
    head = "| net | channels gone | bits | parameters left |"
    print(head + "".join(f" {name} |" for name in REPAIRS) + " dense |")
    print("| --- |" + " ---: |" * (4 + len(REPAIRS)))
    for name in ("vgg", "resnet"):
        programs = [digits.traced(digits.trained(name, seed)) for seed in seeds]
        dense = fmean(digits.accuracy(program) for program in programs)
        for ratio, bits in RUNS:
            cells, left = [], 0.0
            for repair in REPAIRS:
                chain = Udfc(ratio=ratio, weight_bits=bits, repair=repair)
                results = [chain.execute(program, Context()) for program in programs]
                cells.append(fmean(digits.accuracy(r.program) for r in results))
                left = fmean(r.metrics["parameters_left"] for r in results)
            row = " | ".join(f"{100 * value:.1f}" for value in (*cells, dense))
            print(f"| {name} | {ratio:.0%} | {bits or 32} | {left:.0%} | {row} |", flush=True)


if __name__ == "__main__":
    main()
