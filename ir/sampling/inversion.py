"""Trajectories backwards: the noise that a sample comes from (DDIM inversion, and P23's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.record import DENOISED, NOISE, Denoiser
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.solvers.first import Euler


@torch.no_grad()
def inverted(
    sampler: Sampler,
    data: Tensor,
    conditions: Mapping[str, Tensor] | None = None,
    *,
    steps: int,
    **settings: Any,
) -> Tensor:
    """The noise that sampling with the same arguments brings back to `data`, nearly.

    The steps of euler (ddim) are gone backwards. A step needs the prediction at the noisier sample,
    which is not known yet; that at the cleaner one stands in, at the noisier level. The error falls
    with the number of steps.

    With sample.cfgpp the two directions change places: the data is freed of the noise without the
    condition, and guided noise is put in, z = (x - s' E_u) / a', x = a z + s E_guided. That keeps
    the error small where classifier-free guidance multiplies it by its scale.

    Args:
        sampler: of a program without state.
        data: [batch, ...], samples at the last level of the trajectory.
        conditions: as in `Sampler.plan`.
        steps: number of steps.
        settings: of the plan.

    Returns:
        [batch, ...], what `Sampler.sample` is given as noise.

    Raises:
        ArgumentError: as `plan`; another solver, or fresh noise; a program whose steps go by
            earlier ones.

    Source: P23, algorithm 3; Song et al. 2021 (DDIM), section 5.4.
    """
    _refuse_state(sampler.record)
    plan = sampler.plan(len(data), conditions, steps=steps, **settings)
    if not isinstance(plan.solver, Euler) or plan.solver.draws:
        raise ArgumentError(
            "only steps of euler (ddim) without fresh noise are gone backwards",
            fix='Sample and invert with `solver="ddim"`.',
        )
    x = data
    for i in reversed(range(plan.path.steps)):
        here, there = plan.path.levels[i], plan.path.levels[i + 1]
        found = sampler.ask(plan, i, x, here, {})
        clean = (x - there.s * found[NOISE]) / there.a
        guided = (x - here.a * found[DENOISED]) / here.s
        x = here.a * clean + here.s * guided
    wide = plan.path.schedule.kind in ("ve", "edm")
    return x / plan.path.levels[0].s if wide else x


def _refuse_state(record: Denoiser) -> None:
    settings = {} if record.guidance is None else record.guidance.settings
    if record.latent:
        raise ArgumentError("a step of this denoiser draws a latent, and backwards there is none")
    kept = [name for name in ("ends_at", "linear", "weights") if name in settings]
    if record.carried or record.cached or kept:
        by = "sample.reuse" if record.guidance is None or record.cached else record.guidance.by
        raise ArgumentError(
            f"a step of {by} goes by earlier ones, and backwards there are none",
            fix="Invert with a bundle of sample.cfgpp, sample.cfg or no guidance.",
        )
