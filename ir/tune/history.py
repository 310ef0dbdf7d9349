"""The result of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphwright.ir.program import Program


@dataclass(frozen=True)
class History:
    """The course of a training run.

    Attributes:
        losses: loss of every optimizer step, averaged over its batches and processes.
        evaluations: (steps done, value) of every evaluation; lower is better.
        best_step: steps done at the best evaluation; None where nothing was evaluated.
        stopped: why it ended before the last step; empty when it did not.
        zeros: share of zeros that stayed zero, by the name of each weight that has such.
        window_bytes: memory of the gradients that the optimizer `mfac` kept; 0 for the others.
    """

    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    stopped: str = ""
    zeros: Mapping[str, float] = field(default_factory=dict)
    window_bytes: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return len(self.losses)


@dataclass(frozen=True)
class Tuned:
    """A trained program, in inference mode, and how it got there."""

    program: Program
    history: History
