"""One linear layer in ONNX Runtime: float, NF4 by MatMulBnb4, and NF4 rebuilt at session start.

    python tests/benchmarks/nf4_speed.py

Medians over alternating runs on one thread, in milliseconds, and what the session's file weighs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.base import Compiled

SIZES = ((384, 1536), (2048, 2048))
ROWS = (1, 16, 128, 1024)
SECONDS = 1.5


def artifacts(inner: int, out: int) -> dict[str, Compiled]:
    """The three forms of one layer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layer = nn.Linear(inner, out).eval()
    program = gw.trace(layer, (torch.randn(2, inner),), dynamic={"input": {0: "rows"}})
    small = gw.passes.quantize.Nf4()(program)
    return {
        "float32": gw.lower(program, "onnxruntime", threads=1),
        "MatMulBnb4": gw.lower(small, "onnxruntime", threads=1),
        "rebuilt": gw.lower(small, "onnxruntime", threads=1, skip=["table"]),
    }


def file_mb(compiled: Compiled) -> float:
    """Megabytes of everything that is saved."""
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "out")
        files = (file for file in Path(folder).rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files) / 1e6


def medians(forms: dict[str, Compiled], x: Tensor) -> dict[str, float]:
    """Milliseconds of each form, run in turns."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(found["float32"]) < 5:
        for name, compiled in forms.items():
            began = time.perf_counter()
            compiled(x)
            found[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def main() -> None:
    sys.stdout.write("| layer | rows | float32 | MatMulBnb4 | rebuilt |\n")
    sys.stdout.write("| --- | ---: | ---: | ---: | ---: |\n")
    for inner, out in SIZES:
        forms = artifacts(inner, out)
        sizes = " | ".join(f"{file_mb(each):.2f} MB" for each in forms.values())
        sys.stdout.write(f"| {inner}x{out} | file | {sizes} |\n")
        for rows in ROWS:
            times = medians(forms, torch.randn(rows, inner))
            shown = " | ".join(f"{ms:.2f} ms" for ms in times.values())
            sys.stdout.write(f"| {inner}x{out} | {rows} | {shown} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
