"""Which program of a bundle a step asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphwright.ir.sampling.plan import Plan
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.variants import CONDITIONED, FULL, OTHER, SHALLOW, STILL, SWITCH

OFF = "guidance_off"
"""In the state once guidance has ended."""

CACHED, BOTH = "cached.", "cached_rows_of_both"
"""In the state: what steps may take over, and whether it has rows without the condition as well."""


def variant(record: Denoiser, plan: Plan, i: int, state: Mapping[str, Any]) -> str:
    """The program that step i asks."""
    name = _guided(record, plan, i, state)
    switch = record.settings.get(SWITCH)
    if switch is not None and i < int(round(switch["until"] * plan.path.steps, 9)):
        return OTHER + name
    push = record.settings.get("push")
    # at least one step pushes, however few there are
    if push is not None and i >= math.ceil(round(push["stop"] * plan.path.steps, 9)):
        name += STILL
    return name + SHALLOW if _may_take_over(record, name, i, state) else name


def _guided(record: Denoiser, plan: Plan, i: int, state: Mapping[str, Any]) -> str:
    guidance = record.guidance
    if guidance is None:
        return FULL
    if plan.linear is not None:
        return FULL if plan.linear["policy"][i] == FULL else CONDITIONED
    steps, settings = plan.path.steps, guidance.settings
    # rounded first: 0.29 of 100 steps is 28.999999999999996
    first, last = (
        int(round(settings.get(*end) * steps, 9)) for end in (("start", 0.0), ("stop", 1.0))
    )
    return FULL if first <= i < last and OFF not in state else CONDITIONED


def _may_take_over(record: Denoiser, name: str, i: int, state: Mapping[str, Any]) -> bool:
    """Whether a step need not compute what was kept, and enough rows of it were."""
    if not record.cached or CACHED + record.cached[0] not in state:
        return False
    settings = record.settings
    steps = settings["refresh"]
    fresh = i % settings["interval"] == 0 if steps is None else i in steps
    wide = state.get(BOTH) is not None or not record.doubles or name.startswith(CONDITIONED)
    return not fresh and wide
