"""Grids: the levels of noise that a trajectory goes through. Imports no torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field

from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Options
from graphwright.ir.sampling.schedule import Level, NoiseSchedule

Spacing = Literal[
    "linspace", "leading", "trailing", "multistep", "lcm", "karras", "log_snr", "uniform"
]
END = Level(0.0, 0.0, 1.0, 0.0)
"""The data itself."""


class Grid(Options):
    """Choice of the levels."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"spacing": "leading"}]})

    spacing: Spacing = "linspace"
    """`linspace`, `leading` and `trailing` choose steps of a table as diffusers does, `multistep`
    is its linspace for multistep solvers; `lcm` takes every k-th of `original_steps`; `karras` is
    the power law in s / a; `log_snr` is uniform in ln(a / s), exponential in s / a; `uniform` is
    uniform in t."""

    steps_offset: int = 0
    """Of leading: added to every step."""

    original_steps: Annotated[int, Field(ge=1)] = 50
    """Of lcm: steps that the model was distilled on."""

    rho: Annotated[float, Field(gt=0)] = 7.0
    """Of karras: the power."""

    start: float | None = None
    """Of karras, log_snr and uniform: t of the first level; the schedule's end when absent."""

    end: float | None = None
    """Of karras, log_snr and uniform: t of the last level that the network is asked about; the
    schedule's other end when absent."""

    told: Literal["exact", "rounded", "floored"] = "exact"
    """Of karras and log_snr on a table: what the network is told of a level between two steps. The
    multistep schedulers of diffusers tell it a whole step, whatever the level."""

    final: Literal["zero", "first", "none"] = "zero"
    """The level behind the last: no noise; the table's first step; or none, so that the last level
    of the grid is where the trajectory ends."""

    stride: Annotated[int, Field(ge=1)] = 1
    """Takes every so many-th level of the grid of so many times the steps: a student that walks on
    the levels of its teacher."""

    def levels(self, schedule: NoiseSchedule, steps: int) -> tuple[Level, ...]:
        """The levels of a trajectory of `steps` steps, one more than those.

        Raises:
            ArgumentError: no such grid on this schedule.
        """
        if steps < 1:
            raise ArgumentError(f"a trajectory has at least one step, not {steps}")
        total = steps * self.stride
        found = self._asked(schedule, total + 1 if self.final == "none" else total)
        _check_falling(found, schedule)
        if self.final != "none":
            last = END if self.final == "zero" else schedule.level(schedule.ends()[0])
            found = (*found, last)
        return found[:: self.stride]

    def _asked(self, schedule: NoiseSchedule, n: int) -> tuple[Level, ...]:
        low, high = schedule.ends()
        start = high if self.start is None else self.start
        end = low if self.end is None else self.end
        if self.spacing in ("karras", "log_snr"):
            return self._by_sigma(schedule, schedule.level(start), schedule.level(end), n)
        if self.spacing == "uniform":
            places = [start + (end - start) * i / max(n - 1, 1) for i in range(n)]
            if schedule.kind == "flow":
                places = [schedule.shifted(t) for t in places]
            return tuple(schedule.level(t) for t in places)
        if schedule.kind != "table":
            raise ArgumentError(
                f"the spacing {self.spacing} chooses steps of a table, and the schedule is "
                f"{schedule.kind}",
                fix="Choose `uniform`, `karras` or `log_snr`.",
            )
        return tuple(schedule.level(float(t)) for t in self._steps(int(high) + 1, n))

    def _by_sigma(
        self, schedule: NoiseSchedule, first: Level, last: Level, n: int
    ) -> tuple[Level, ...]:
        if not (last.sigma > 0 and math.isfinite(first.sigma)):
            raise ArgumentError(
                f"the spacing {self.spacing} has no place for noise of {last.sigma:g} and "
                f"{first.sigma:g}",
                fix="Give `start` and `end` inside the schedule.",
            )
        i = np.arange(n) / max(n - 1, 1)
        if self.spacing == "karras":
            big, small = first.sigma ** (1 / self.rho), last.sigma ** (1 / self.rho)
            sigmas = (big + i * (small - big)) ** self.rho
        else:
            sigmas = np.exp(math.log(first.sigma) + i * math.log(last.sigma / first.sigma))
        inner = [self._whole(schedule, schedule.at_sigma(float(sigma))) for sigma in sigmas[1:-1]]
        return (first, *inner, last)[:n] if n > 1 else (first,)

    def _whole(self, schedule: NoiseSchedule, level: Level) -> Level:
        """A level with the time of a whole step."""
        if self.told == "exact":
            return level
        step = float(round(level.t) if self.told == "rounded" else math.floor(level.t))
        return replace(level, time=schedule.level(step).time)

    def _steps(self, total: int, n: int) -> np.ndarray:
        if n > total:
            raise ArgumentError(f"{n} steps of a table of {total}")
        if self.spacing == "lcm" and not n <= self.original_steps <= total:
            raise ArgumentError(
                f"the spacing lcm takes {n} of {self.original_steps} original_steps of a table of "
                f"{total}",
                fix="Give `original_steps` from the number of steps to the length of the table.",
            )
        if self.spacing == "linspace":
            return np.linspace(0, total - 1, n)[::-1]
        if self.spacing == "leading":
            return (np.arange(n) * (total // n)).round()[::-1] + self.steps_offset
        if self.spacing == "trailing":
            return np.round(np.arange(total, 0, -total / n)) - 1
        if self.spacing == "multistep":
            return np.linspace(0, total - 1, n + 1).round()[::-1][:-1]
        known = np.arange(1, self.original_steps + 1) * (total // self.original_steps) - 1
        picked = np.floor(np.linspace(0, len(known), num=n, endpoint=False)).astype(int)
        return np.asarray(known[::-1][picked])


def _check_falling(levels: tuple[Level, ...], schedule: NoiseSchedule) -> None:
    """Refuses levels that are off the schedule, or that do not fall from step to step."""
    low, high = schedule.ends() if schedule.kind != "edm" else (0.0, math.inf)
    for level in levels:
        if not math.isfinite(level.time):
            raise ArgumentError(f"the network cannot be told the level at t = {level.t:g}: its "
                                f"time is {level.time:g}",
                                fix="Choose `start` and `end` inside the schedule.")  # fmt: skip
        if not low - 1e-9 <= level.t <= high + 1e-9:
            raise ArgumentError(
                f"the grid goes to t = {level.t:g}, and the schedule from {low:g} to {high:g}",
                fix="Choose `start`, `end` and `steps_offset` inside the schedule.",
            )
    for one, two in itertools.pairwise(levels):
        if two.t >= one.t:
            raise ArgumentError(
                f"the grid goes from t = {one.t:g} to {two.t:g}, and noise has to fall",
                fix="Take fewer steps, or a `start` above `end`.",
            )
