"""Seconds and memory of UDFC on wide layers, and seconds of VPTQ by its options.

    python tests/benchmarks/data_free_cost.py [--width 4096]

UDFC: three linear layers of one width with ReLU between, 30% of the inner channels go; every repair
by itself. VPTQ: one linear layer of 768 to 3072, 2048 rows of calibration data. One thread;
`above loaded` is the peak of resident memory over what the process held before.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _paths  # noqa: F401  puts tests/ on the path
import torch
from gptq_cost import Peak, resident
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context

REPAIRS = ("none", "ridge", "nonneg", "features", "auto")
VPTQ = ({}, {"bits": 2}, {"bits": 3}, {"bits": 2, "fit_steps": 0})


def udfc(width: int) -> None:
    """A row per repair."""
    torch.manual_seed(0)
    wide = [nn.Linear(width, width) for _ in range(3)]
    net = nn.Sequential(wide[0], nn.ReLU(), wide[1], nn.ReLU(), wide[2]).eval()
    x = torch.randn(64, width)
    program = gw.trace(net, (x[:2],), {"input": {0: "n"}})
    with torch.no_grad():
        exact = program(x)
    print("| width | repair | seconds | MB above loaded | output error |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for repair in REPAIRS:
        before, start = resident(), time.perf_counter()
        with Peak() as peak:
            made = gw.passes.prune.Udfc(ratio=0.3, repair=repair).execute(program, Context())
        seconds = time.perf_counter() - start
        with torch.no_grad():
            error = float((made.program(x) - exact).norm() / exact.norm())
        mb = (peak.bytes - before) / 1e6
        print(f"| {width} | {repair} | {seconds:.1f} | {mb:.0f} | {error:.3f} |", flush=True)


def vptq() -> None:
    """A row per set of options."""
    torch.manual_seed(0)
    x = torch.randn(2048, 768) @ torch.randn(768, 768).tril() / 28
    net = nn.Linear(768, 3072).eval()
    program = gw.trace(net, (x[:2],), {"input": {0: "n"}})
    print("\n| VPTQ | codebooks, bits, error | seconds |")
    print("| --- | --- | ---: |")
    for options in VPTQ:
        start = time.perf_counter()
        method = gw.passes.quantize.Vptq(**options)
        made = method.execute(program, Context(calibration=[(x,)]))
        seconds = time.perf_counter() - start
        print(f"| {options} | {made.actions[0].what} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    torch.set_num_threads(1)
    udfc(parser.parse_args().width)
    vptq()


if __name__ == "__main__":
    main()
