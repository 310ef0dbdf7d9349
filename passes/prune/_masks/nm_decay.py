"""Schedules of N:M training: the pattern and the mask value of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from graphwright.ir.errors import ArgumentError

Pattern = tuple[int, int]
"""(N, M): of every M consecutive weights, N are kept."""

Decay = Literal["linear", "exponential"]

FALL = 10.0
"""Exponent that the mask value falls to where no rate is given: e^-10 is 5e-5."""


@dataclass(frozen=True)
class Stage:
    """The mask of a step: the weights outside the `n`:`m` mask count `value` times."""

    n: int
    m: int
    value: float


@dataclass(frozen=True)
class NmSchedule:
    """A dense phase, patterns that tighten, and a phase under the final binary mask.

    Attributes:
        frames: patterns between the dense and the last phase, which share its steps equally; the
            last one is the pattern that stays.
        decay: how the mask value of pruned weights falls; None for a binary mask.
        rate: c of `decay`, per step; None for one that ends with the masked phase.
        dense: share of the steps without a mask, at the begin.
        finetune: share of the steps under the final binary mask, at the end.
    """

    frames: tuple[Pattern, ...]
    decay: Decay | None = None
    rate: float | None = None
    dense: float = 0.0
    finetune: float = 0.0

    @property
    def final(self) -> Pattern:
        """The pattern that the weights end in."""
        return self.frames[-1]

    @property
    def widest(self) -> int:
        """The largest M, which has to divide the rows."""
        return max(m for _, m in self.frames)

    def at(self, step: int, total: int) -> Stage | None:
        """The mask of step `step` of `total`; None for dense weights.

        Raises:
            ArgumentError: there are fewer steps than patterns to go through.
        """
        begin, end = self.bounds(total)
        if step < begin:
            return None
        if step >= end:
            return Stage(*self.final, 0.0)
        passed = step - begin
        n, m = self.frames[passed * len(self.frames) // (end - begin)]
        return Stage(n, m, mask_value(self.decay, self.rate_of(end - begin), passed))

    def rate_of(self, steps: int) -> float:
        """c for so many masked steps: as given, or what brings exp to e^-10 and the line to 0."""
        if self.rate is not None:
            return self.rate
        return (FALL if self.decay == "exponential" else 1.0) / steps

    def bounds(self, total: int) -> tuple[int, int]:
        """First step under a mask, and first step under the final binary one.

        Raises:
            ArgumentError: there are fewer steps than patterns to go through.
        """
        begin, end = round(self.dense * total), total - round(self.finetune * total)
        if end - begin < len(self.frames):
            raise ArgumentError(
                f"{max(0, end - begin)} of {total} training steps are left for the "
                f"{len(self.frames)} patterns of the schedule",
                fix="Train for more steps, or lower `dense` and `finetune`.",
            )
        return begin, end

    def value_at_end(self, steps: int, total: int) -> float:
        """Mask value in the last of `steps` steps before the final binary mask; 1 while dense."""
        begin, end = self.bounds(total)
        passed = min(steps, end) - 1 - begin
        rate = self.rate_of(end - begin)
        return mask_value(self.decay, rate, passed) if passed >= 0 else 1.0


def mask_value(decay: Decay | None, rate: float, step: int) -> float:
    """b_t: max(0, 1 - c t) or exp(-c t), and 0 without decay."""
    if decay is None:
        return 0.0
    return max(0.0, 1.0 - rate * step) if decay == "linear" else math.exp(-rate * step)


def stepwise(n: int, m: int) -> tuple[Pattern, ...]:
    """(M-1):M, then M/2:M, M/4:M, ... down to N:M.

    Raises:
        ValueError: M is not N times a power of two.
    """
    halvings = (m // n).bit_length() - 1
    if n << halvings != m:
        raise ValueError(f"{m} is not {n} times a power of two")
    return ((m - 1, m), *((m >> i, m) for i in range(1, halvings + 1)))


def geometric(n: int, m: int, widest: int) -> tuple[Pattern, ...]:
    """kN:kM for k = `widest`, `widest` / 2, ..., 1: the same sparsity in ever smaller groups."""
    return tuple((n * k, m * k) for k in _halving(widest))


def densify(n: int, m: int, widest: int) -> tuple[Pattern, ...]:
    """N:kM for k = `widest`, `widest` / 2, ..., 1: from too sparse to the target."""
    return tuple((n, m * k) for k in _halving(widest))


def _halving(widest: int) -> list[int]:
    return [widest >> i for i in range(widest.bit_length())]
