"""Time and memory of GPTQ by the number of equal layers, and per layer against llm-compressor.

    python tests/benchmarks/gptq_cost.py [--width 1024] [--peer PYTHON]

Every model runs in a process of its own: N linear layers of one width with ReLU between, 1024 rows
of calibration data, 4 bits in blocks of 128, one thread. `above loaded` is the peak of resident
memory over what the process held with the model and the data loaded. With `--peer`, an interpreter
that has llmcompressor, one layer of the same size and Hessian is rounded by both in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROWS, BATCHES, BLOCK, REPEATS = 256, 4, 128, 3


def resident() -> int:
    """Bytes of resident memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


class Peak:
    """Largest resident memory while it is entered, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self.done = resident(), threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measure(layers: int, width: int) -> dict[str, float]:
    """One model in this process."""
    import graphwright as gw
    from graphwright.ir.context import Context

    torch.manual_seed(0)
    parts = [m for _ in range(layers) for m in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    batches = [(torch.randn(ROWS, width),) for _ in range(BATCHES)]
    program = gw.trace(torch.nn.Sequential(*parts).eval(), batches[0])
    step = gw.passes.quantize.Gptq(block=BLOCK)
    loaded = resident()
    began, busy = time.perf_counter(), time.process_time()
    with Peak() as peak:
        step.execute(program, Context(calibration=batches))
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - busy,
        "loaded": loaded,
        "peak": peak.bytes,
    }


def one_layer(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the H of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(width, width, generator=generator) / width**0.5
    mix = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(2 * width, width, generator=generator) @ mix
    return w, x.T @ x / len(x)


def ours(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The rounded weight by this project."""
    from graphwright.ir.calibration.hessian import inverse_factor
    from graphwright.passes.quantize._math.gptq import GptqSettings, round_matrix

    settings = GptqSettings(4, BLOCK, static=True)
    rounded = round_matrix(w, h, lambda m: inverse_factor(m)[0], settings)
    return rounded.value(BLOCK)


def theirs(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The rounded weight by llm-compressor, with scales of the given weights."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    settings = QuantizationArgs(
        num_bits=4, symmetric=False, strategy="group", group_size=BLOCK, observer="minmax"
    )
    groups = w.unflatten(1, (-1, BLOCK))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
    found: Any = quantize_weight(
        w.clone()[None], h.clone()[None], scale[None], zero[None], None, quant_args=settings,
        blocksize=128, percdamp=0.01,
    )  # fmt: skip
    value: torch.Tensor = found[0][0]
    return value


def timed(kind: str, width: int) -> dict[str, float]:
    """CPU seconds of one layer, the least of some runs, and the error of its outputs."""
    w, h = one_layer(width)
    wide = h.double()
    run = ours if kind == "ours" else theirs
    best = float("inf")
    with torch.no_grad():
        for _ in range(REPEATS):
            began = time.process_time()
            value = run(w, h)
            best = min(best, time.process_time() - began)
        change, size = (float(((m @ wide) * m).sum()) for m in ((value - w).double(), w.double()))
    return {"cpu": best, "error": (change / size) ** 0.5}


def child(python: str, *arguments: str) -> dict[str, float]:
    """What this script prints in a process of its own."""
    command = [python, __file__, "--child", *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--peer", help="an interpreter with llmcompressor")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        kind = options.child[0]
        found = (
            timed(kind, int(options.child[1]))
            if kind in ("ours", "theirs")
            else measure(int(kind), int(options.child[1]))
        )
        print(json.dumps(found))
        return 0
    print(f"| layers of {options.width} | CPU s per layer | peak MB | above loaded MB |")
    print("| --- | --- | --- | --- |")
    rows = {n: child(sys.executable, str(n), str(options.width)) for n in (2, 10)}
    for n, row in rows.items():
        above = (row["peak"] - row["loaded"]) / 1e6
        print(f"| {n} | {row['cpu'] / n:.2f} | {row['peak'] / 1e6:.0f} | {above:.0f} |")
    two, ten = rows[2], rows[10]
    print(
        f"\nTen against two: peak {ten['peak'] / two['peak']:.2f} x, above loaded "
        f"{(ten['peak'] - ten['loaded']) / (two['peak'] - two['loaded']):.2f} x, time per layer "
        f"{ten['cpu'] / 10 / (two['cpu'] / 2):.2f} x"
    )
    if options.peer:
        print("\n| one layer | CPU s | relative error of outputs |\n| --- | --- | --- |")
        for name, kind in (("graphwright", "ours"), ("llm-compressor", "theirs")):
            python = sys.executable if kind == "ours" else options.peer
            row = child(python, kind, str(options.width))
            print(f"| {name} | {row['cpu']:.2f} | {row['error']:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
