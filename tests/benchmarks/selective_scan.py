"""Selective scan on a CPU: the recurrence step by step, in chunks, and ONNX Runtime's Scan.

    python tests/benchmarks/selective_scan.py

All compute one function of one set of tensors, alternating; medians of `ROUNDS` runs. The rows
are the projector of P84 on a 7 x 7 map, and lengths of sequences of a small Mamba.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import _paths  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.ops.selective_scan import chunked, recurrence, selective_scan

ROUNDS = 9
SIZES = ((8, 49, 64, 256), (1, 196, 256, 16), (4, 512, 128, 16), (1, 2048, 128, 16))


class Scan(nn.Module):
    """The op alone."""

    def forward(self, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return selective_scan(x, delta, a, b, c)


def drawn(batch: int, length: int, width: int, states: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, spread = torch.randn((2, batch, length, width), generator=g)
    b, c = torch.randn((2, batch, length, states), generator=g)
    return x, F.softplus(spread), -torch.rand((width, states), generator=g) - 0.1, b, c


def milliseconds(runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median time of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Prints the table, on one thread."""
    torch.set_num_threads(1)
    print(f"{'B, L, D, N':22}{'steps ms':>10}{'chunks ms':>11}{'ratio':>7}{'onnx ms':>9}")
    for size in SIZES:
        given = drawn(*size)
        with torch.no_grad():
            compiled = gw.lower(gw.trace(Scan(), given), "onnxruntime")
            torch.testing.assert_close(chunked(*given), recurrence(*given), rtol=1e-4, atol=1e-4)
            found = milliseconds({
                "steps": lambda g=given: recurrence(*g), "chunks": lambda g=given: chunked(*g),
                "onnx": lambda g=given, run=compiled: run(*g),
            })  # fmt: skip
        ratio = found["steps"] / found["chunks"]
        print(f"{size!s:22}{found['steps']:10.1f}{found['chunks']:11.1f}{ratio:7.2f}"
              f"{found['onnx']:9.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
