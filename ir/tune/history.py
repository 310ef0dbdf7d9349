"""The result of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from graphwright.ir.errors import ModelError
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
        batch_sizes: samples of every step, where `batch_size` lets them grow.
        window_bytes: memory of the gradients that the optimizer `mfac` kept; 0 for the others.
    """

    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    stopped: str = ""
    zeros: Mapping[str, float] = field(default_factory=dict)
    window_bytes: int = 0
    batch_sizes: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return len(self.losses)


@dataclass(frozen=True)
class Tuned:
    """A trained program, in inference mode, and how it got there."""

    program: Program
    history: History


class Losses:
    """Losses of the steps so far; they stay on the device until they are asked for."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._values: list[Tensor | float] = list(values)

    def append(self, loss: Tensor) -> None:
        """Adds the loss of a step."""
        self._values.append(loss)

    def finite(self) -> list[float]:
        """All of them as numbers.

        Raises:
            ModelError: one of them is none; says in which step.
        """
        values = self._values
        fresh = next((i for i, v in enumerate(values) if isinstance(v, Tensor)), len(values))
        values[fresh:] = [float(value) for value in values[fresh:]]
        numbers = [float(value) for value in values]
        for index in range(fresh, len(numbers)):
            if not math.isfinite(numbers[index]):
                raise ModelError(
                    f"the loss is {numbers[index]} in step {index}",
                    fix="Lower `lr`, add `warmup` or set `clip_norm`.",
                )
        return numbers
