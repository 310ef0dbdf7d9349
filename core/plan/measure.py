"""How fast this machine does each kind of work: `python -m graphwright.plan.measure DEVICE`.

Runs in a process of its own, so that what it imports and allocates does not show in a run's
memory, and prints one JSON object. Takes a few seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.program import Program

SECONDS = 0.15
"""Time that a kernel is measured for; at least two calls."""


class Clock:
    """Seconds since it was made, without those that other processes took of the machine.

    The time of the processor is at most that of the clock where one thread works on a free
    machine, and more where several do; the smaller of the two is right in both.
    """

    def __init__(self) -> None:
        self.wall, self.own = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """Time so far."""
        own = time.process_time() - self.own
        return max(min(time.perf_counter() - self.wall, own), 1e-9)


def measure(device: str) -> dict[str, Any]:
    """Rates per second of each kind of work, and what lowering costs: see `Rates`.

    Args:
        device: `cpu` or `cuda`, where the arithmetic is measured.
    """
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kernels = _kernels(device)
    program = _small_program()
    calls, edited = _calls(program), _edits(program)
    lowered = {name: _lowering(program, name) for name in ("onnxruntime", "triton")}
    if threads > 1:
        # On a busy machine threads wait for each other: then one alone was faster, and says more.
        torch.set_num_threads(threads)
        kernels = {name: max(rate, kernels[name]) for name, rate in _kernels(device).items()}
    return {**kernels, "calls": calls, "edited": edited, "lowered": lowered, "written": _disk()}


def _kernels(device: str) -> dict[str, float]:
    """Rates of arithmetic, with the threads that torch has now."""
    import torch

    size, bytes_moved = 384, 32 << 20
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    x = torch.randn(bytes_moved // 4, device=device)
    matrix = a @ a.T + size * torch.eye(size, device=device)
    small = a[:192, :192].contiguous()
    with torch.inference_mode():
        return {
            "macs": size**3 / _seconds(lambda: a @ b, device),
            "moved": 2 * bytes_moved / _seconds(lambda: x * 2.0, device),
            "factored": size**3 / 3 / _seconds(lambda: torch.linalg.cholesky(matrix), device),
            "decomposed": 192**3 / _seconds(lambda: torch.linalg.svd(small), device),
        }


def _seconds(call: Callable[[], object], device: str) -> float:
    """Shortest time of a call, behind one that warms up: other work only makes calls longer."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    begin = time.perf_counter()
    times: list[float] = []
    while len(times) < 2 or time.perf_counter() - begin < SECONDS:
        one, clock = time.perf_counter(), Clock()
        call()
        wait()
        times.append(time.perf_counter() - one if device == "cuda" else clock.seconds())
    return min(times)


def _small_program() -> Program:
    """Layers so small that the calls of operators are all that costs."""
    import torch
    from torch import nn

    import graphwright as gw

    blocks = [part for _ in range(6) for part in (nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16))]
    model = nn.Sequential(*blocks).eval()
    program: Program = gw.trace(model, (torch.randn(2, 4, 16),), {"input": {0: "batch", 1: "n"}})
    return program


def _calls(program: Program) -> float:
    import torch

    count = sum(1 for node in program.graph.nodes if node.op == "call_function")
    with torch.no_grad():
        return count / _seconds(lambda: program.run_flat(program.examples), "cpu")


def _edits(program: Program) -> float:
    """Nodes per second of a pass that writes every layer anew."""
    from graphwright.ir.context import Context
    from graphwright.passes.registry import find_pass

    step = find_pass("quantize.rtn")(block=16)
    step.execute(program, Context())
    clock = Clock()
    step.execute(program, Context())
    return len(program.graph.nodes) / clock.seconds()


def _lowering(program: Program, backend: str) -> dict[str, float]:
    """Seconds and bytes of the first lowering alone, and seconds per node of any."""
    import graphwright as gw
    from graphwright.job.memory import peak_rss_bytes, reset_peak

    reset_peak()
    held = peak_rss_bytes()
    times = []
    for _ in range(2):
        clock = Clock()
        gw.lower(program, backend)
        times.append(clock.seconds())
    return {
        "first": max(times[0] - times[1], 0.0),
        "node": times[1] / len(program.graph.nodes),
        "memory": float(max(peak_rss_bytes() - held, 0)),
    }


def _disk() -> float:
    """Bytes per second of a file that is written and synchronized, in the temporary folder."""
    import os

    content = bytes(16 << 20)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with (Path(folder) / "probe").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return len(content) / (time.perf_counter() - begin)


if __name__ == "__main__":
    begun = time.perf_counter()
    rates = measure(sys.argv[1])
    sys.stdout.write(json.dumps({**rates, "seconds": time.perf_counter() - begun}) + "\n")
