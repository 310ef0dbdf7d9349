"""What a removal saves: units, parameters, multiply-accumulates, bytes, or measured time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from graphwright.ir.channels import ChannelGroup, cut
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.context import Context
from graphwright.ir.program import Program

Of = Literal["groups", "parameters", "macs", "bytes", "latency"]
Measure = Callable[[np.ndarray], float]
"""What is left, from removal flags by class."""

RUNS = 7
"""Runs of which the fastest counts; what disturbs a run only makes it slower."""


def measure(of: Of, groups: Sequence[ChannelGroup], context: Context) -> Measure:
    """The measure of an analysis by name, in its own unit.

    Args:
        of: what is counted.
        groups: eligible groups of one analysis.
        context: device that time is measured on.
    """
    analysis = groups[0].analysis
    if of == "groups":
        inside = np.concatenate([g.classes for g in groups])
        return lambda removed: float((~removed[inside]).sum())
    if of == "latency":
        return _Latency(groups, context)
    counts = {
        "parameters": lambda removed: float(analysis.parameters(removed)),
        "macs": analysis.macs,
        "bytes": lambda removed: _bytes(analysis, removed),
    }
    return counts[of]


def cost_of_unit(of: Of, group: ChannelGroup) -> float:
    """What one unit of a group saves, about; multiply-accumulates stand for time."""
    if of == "groups":
        return 1.0
    found = {"parameters": group.parameters, "bytes": group.bytes}.get(of, group.macs)
    return max(found, 1e-9)


def _bytes(analysis: Analysis, removed: np.ndarray) -> float:
    """Bytes of all stored tensors, tied ones once."""
    total = 0.0
    for name in dict.fromkeys(name for name, _ in analysis.stored):
        tensor = analysis.program.state[name]
        left = [int((~removed[analysis.stored[name, d]]).sum()) for d in range(tensor.dim())]
        total += float(np.prod(left)) * tensor.element_size()
    return total


class _Latency:
    """Seconds that the cut program takes on its examples, as PyTorch runs it; each cut once."""

    def __init__(self, groups: Sequence[ChannelGroup], context: Context) -> None:
        self.groups, self.context = groups, context
        self.known: dict[bytes, float] = {}

    def __call__(self, removed: np.ndarray) -> float:
        key = np.packbits(removed).tobytes()
        if key not in self.known:
            picks = {g: np.flatnonzero(removed[g.classes]).tolist() for g in self.groups}
            chosen = {g: units for g, units in picks.items() if units}
            program = self.groups[0].analysis.program
            self.known[key] = seconds(cut(program, chosen) if chosen else program)
            self.context.progress("measuring", len(self.known), 0)
        return self.known[key]


def seconds(program: Program, runs: int = RUNS) -> float:
    """Time of the fastest of some runs on the program's examples."""
    inputs, device = program.examples, program.examples[0].device
    best = float("inf")
    with torch.no_grad():
        program.run_flat(inputs)
        for _ in range(runs):
            begin = time.perf_counter()
            program.run_flat(inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - begin)
    return best
