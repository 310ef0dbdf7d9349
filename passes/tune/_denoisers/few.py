"""Levels of generators of few steps, and of the samples that they are compared on."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.parameterization import DIVIDES_BY_SIGNAL
from graphwright.ir.sampling.schedule import FAR, Level
from graphwright.ir.sampling.training import Levels, Training

RHO = 7.0
"""Power of the levels of edm (Karras et al. 2022)."""

FAINT = 0.05
"""Signal at the first level below which a network that is divided by it is warned about."""

NEAR = 1e-3
"""Share of a closed schedule between its end without noise and the least level of a jump; and
between its beginning without signal and the first."""


def jumps(training: Training, steps: int) -> Grid:
    """The first levels of `steps` equal jumps from pure noise to data.

    Equal in the time of the schedule, and of edm in sigma^(1/7); behind the last one is
    no noise.
    """
    schedule = training.schedule
    if schedule.kind == "table":
        return Grid(spacing="trailing")
    low, high = schedule.ends()
    if schedule.kind == "edm":
        ends = low ** (1 / RHO), high ** (1 / RHO)
        return Grid(spacing="karras", end=(ends[0] + (ends[1] - ends[0]) / steps) ** RHO)
    return Grid(spacing="uniform", end=low + (high - low) / steps)


def between(training: Training) -> Grid:
    """Levels that jumps start and end at, from pure noise to next to none, which is where samples
    end: equal in the time of the schedule, and of edm in sigma^(1/7)."""
    schedule = training.schedule
    if schedule.kind == "table":
        return Grid(spacing="trailing", final="first")
    if schedule.kind == "edm":
        return Grid(spacing="karras", final="none")
    low, high = schedule.ends()
    if schedule.kind == "ve":
        return Grid(spacing="uniform", final="none")
    share = NEAR * (high - low)
    start = high - share if schedule.kind == "flow" else high
    return Grid(spacing="uniform", start=start, end=low + share, final="none")


def spread_levels(
    training: Training, n: int, generator: torch.Generator
) -> list[tuple[Level, float]]:
    """n levels over the whole schedule, each with its place there from 0 to 1.

    Uniform in t, and of edm in sigma^(1/7).
    """
    schedule = training.schedule
    low, high = schedule.ends()
    if schedule.kind != "edm":
        drawn = training.draw(n, generator)
        return [(level, (level.t - low) / (high - low)) for level in drawn]
    ends = low ** (1 / RHO), high ** (1 / RHO)
    shares = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
    return [(schedule.level((ends[0] + u * (ends[1] - ends[0])) ** RHO), u) for u in shares]


def told_level(levels: Levels) -> Tensor:
    """What a second network, or one that jumps, is told of levels: `Level.told`, [batch, 1]."""
    logs = (levels.s / levels.a).log().clamp(-FAR, FAR)
    return logs[:, None] / 4


def faint(training: Training, first: Level) -> tuple[str, ...]:
    """A warning of a network whose output is divided by next to no signal."""
    kind = training.record.parameterization
    if kind not in DIVIDES_BY_SIGNAL or first.a >= FAINT:
        return ()
    return (
        f"the network predicts {kind}, and the first step divides it by {first.a:.2g}: few steps "
        "want a network of v or x0",
    )
