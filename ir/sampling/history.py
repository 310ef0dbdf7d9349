"""LinearAG in the driver: the history of a trajectory, and what was not asked estimated from it."""

from __future__ import annotations

from torch import Tensor

from graphwright.ir.sampling.joint import Both
from graphwright.ir.sampling.linear import estimated, regressors
from graphwright.ir.sampling.plan import Plan
from graphwright.ir.sampling.record import DENOISED, NOISE
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.variants import CONDITIONED

WITH, WITHOUT = "history.with.", "history.without."
"""In the state: predictions of every step so far."""


def completed(
    plan: Plan,
    i: int,
    x: Tensor,
    level: Level | Both,
    found: dict[str, Tensor],
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What a step found, guided by an estimate where it was asked with the condition alone.

    Args:
        plan: the trajectory; one without LinearAG leaves `found` as it is.
        i: number of the step.
        x: [batch, ...], what was asked about.
        level: of noise; of both pictures of a pair, which takes no LinearAG.
        found: outputs of the program.
        state: of the trajectory; the history is added.
    """
    linear = plan.linear
    if linear is None or isinstance(level, Both) or linear["policy"][i] == CONDITIONED:
        return found
    withs, withouts = ([state[f"{part}{k}"] for k in range(i)] for part in (WITH, WITHOUT))
    own = found.get(linear["with"], found[NOISE])
    other = found.get(linear["without"])
    if other is None:
        parts = regressors([*withs, own], withouts)
        other = estimated(linear["coefficients"][str(i)], parts)
        scale = plan.parameters["guidance_scale"][i]
        noise = other + scale * (own - other)
        found = {**found, DENOISED: (x - level.s * noise) / level.a, NOISE: noise}
    state |= {f"{WITH}{i}": own, f"{WITHOUT}{i}": other}
    return found
