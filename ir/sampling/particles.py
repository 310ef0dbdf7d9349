"""Feynman-Kac correctors (P35): particles with weights, so that a mixed score has its target."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.plan import Plan
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.schedule import NoiseSchedule
from graphwright.ir.sampling.solvers.base import Path, Prediction


@dataclass(frozen=True)
class Mixed:
    """The target prod_i p_i^b_i at every level: scores s_i and their exponents b_i.

    Guidance is two scores with (w, 1 - w), annealing one with b, a product of experts (1, ..., 1).

    Attributes:
        exponents: b_i.
    """

    exponents: tuple[float, ...]

    def score(self, scores: Sequence[Tensor]) -> Tensor:
        """sum b_i s_i, the score that is simulated."""
        total = self.exponents[0] * scores[0]
        for b, score in zip(self.exponents[1:], scores[1:], strict=True):
            total = total + b * score
        return total

    def rate(self, scores: Sequence[Tensor], g2: float) -> Tensor:
        """Growth of a particle's log-weight per time, [particles].

        g^2 / 2 (|S|^2 - sum b_i |s_i|^2). The divergence of a linear drift is the same for all
        particles and left out.
        """
        squares = sum(
            b * score.flatten(1).square().sum(1)
            for b, score in zip(self.exponents, scores, strict=True)
        )
        found: Tensor = g2 / 2 * (self.score(scores).flatten(1).square().sum(1) - squares)
        return found


def effective_size(log_weights: Tensor) -> Tensor:
    """1 / sum W^2 of every group, [groups] from [groups, particles]."""
    share = log_weights.softmax(1)
    return 1 / share.square().sum(1)


def systematic(log_weights: Tensor, offsets: Tensor) -> Tensor:
    """Which particle every particle becomes, by systematic resampling within its group.

    Args:
        log_weights: [groups, particles].
        offsets: [groups] uniform in [0, 1).

    Returns:
        indices [groups, particles] int64 into the group.
    """
    groups, count = log_weights.shape
    ends = log_weights.double().softmax(1).cumsum(1)
    ends[:, -1] = 1.0  # against rounding
    marks = (torch.arange(count, dtype=torch.float64) + offsets[:, None].double()) / count
    found: Tensor = torch.searchsorted(ends, marks.expand(groups, count).contiguous())
    return found.clamp_max(count - 1)


def corrected_step(
    mixed: Mixed,
    predictions: Sequence[Prediction],
    x: Tensor,
    log_weights: Tensor,
    path: Path,
    i: int,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """(x, log-weights) behind one Euler-Maruyama step of the reverse SDE with a mixed score.

    Args:
        mixed: the target.
        predictions: of every score's denoiser at x; the score is -E / s.
        x: [particles, ...].
        log_weights: [particles].
        path: a schedule in closed form.
        i: number of the step.
        noise: standard normal, in the shape of x.

    Source: P35, propositions 3.1 to 3.4; the general sum is derived from the Fokker-Planck
    equation.
    """
    here, there = path.levels[i], path.levels[i + 1]
    f, g2 = drift(path.schedule, here.t, here.a, here.s)
    scores = [-p.noise / here.s for p in predictions]
    dt = here.t - there.t
    moved = x + (-f * x + g2 * mixed.score(scores)) * dt + (g2 * dt) ** 0.5 * noise
    return moved, log_weights + mixed.rate(scores, g2) * dt


def drift(schedule: NoiseSchedule, t: float, a: float, s: float) -> tuple[float, float]:
    """(f, g^2) of the forward SDE dx = f x dt + g dw."""
    da, ds = schedule.slopes(t)
    f = da / a
    return f, max(2 * s * ds - 2 * f * s**2, 0.0)


def resampled(
    state: dict[str, Tensor], log_weights: Tensor, particles: int, offsets: Tensor, least: float
) -> tuple[dict[str, Tensor], Tensor]:
    """All tensors of a state, and the weights, resampled in the groups that have too few left.

    Args:
        state: tensors with a row per particle, the sample among them: one permutation for all.
        log_weights: [rows]; zero behind a resampling.
        particles: in a group; rows of one group lie together, and groups are never mixed.
        offsets: [groups] uniform in [0, 1).
        least: share of the particles below which the effective number of a group triggers; 1 or
            more for every step.

    Raises:
        ArgumentError: rows that are no whole number of groups, or groups of one.
    """
    rows = len(log_weights)
    if particles < 2 or rows % particles:
        raise ArgumentError(
            f"{rows} rows are no groups of {particles} particles",
            fix="Give every sample the same number of particles, 2 or more.",
        )
    grouped = log_weights.reshape(-1, particles)
    few = effective_size(grouped) < least * particles
    own = torch.arange(particles).expand_as(grouped)
    picked = torch.where(few[:, None], systematic(grouped, offsets), own)
    index = (picked + particles * torch.arange(len(grouped))[:, None]).flatten()
    left = torch.where(few[:, None], torch.zeros_like(grouped), grouped).flatten()
    return {name: tensor[index] for name, tensor in state.items()}, left


ALWAYS = 2.0
"""Share of the particles that never is left."""

RATE, WEIGHTS = "weight_rate", "log_weights"
"""Entries of the driver's state, [batch]."""


def reweighted(
    plan: Plan,
    record: Denoiser,
    i: int,
    x: Tensor,
    state: dict[str, Tensor],
    doubled: Collection[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """(x, state) behind a step, with weights grown by it, and resampled but for the last step.

    Args:
        plan: the trajectory.
        record: of the denoiser.
        i: number of the step.
        x: [particles, ...] behind it.
        state: tensors with a row per particle, and flags without an axis.
        doubled: names of those that are [2, particles, ...].
    """
    here, there = plan.path.levels[i], plan.path.levels[i + 1]
    _, g2 = drift(plan.path.schedule, here.t, here.a, here.s)
    rest = dict(state)
    grown = g2 * (here.t - there.t) * rest.pop(RATE).double()
    weights = rest.pop(WEIGHTS, torch.zeros(len(x), dtype=torch.float64)) + grown
    assert record.guidance is not None
    least = float(record.guidance.settings["weights"]["least"])
    if i + 1 < plan.path.steps:
        flags = {n: t for n, t in rest.items() if not t.dim()}
        rows = {n: _turned(n, t, doubled) for n, t in rest.items() if t.dim()}
        moved, weights = resampled(
            {**rows, "x": x}, weights, plan.particles, _offsets(plan, i), least
        )
        x = moved.pop("x")
        rest = {**flags, **{n: _turned(n, t, doubled) for n, t in moved.items()}}
    return x, {**rest, WEIGHTS: weights}


def settled(plan: Plan, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Samples of the target: the last particles, resampled by the weights that are left."""
    offsets = _offsets(plan, plan.path.steps)
    moved, _ = resampled({"x": x}, state[WEIGHTS], plan.particles, offsets, ALWAYS)
    return moved["x"]


def _turned(name: str, tensor: Tensor, doubled: Collection[str]) -> Tensor:
    """Rows first, and back."""
    return tensor.transpose(0, 1) if name in doubled else tensor


def _offsets(plan: Plan, i: int) -> Tensor:
    """Uniform numbers of every group, for the resampling behind step i."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + i)
    return torch.rand(plan.batch // plan.particles, generator=generator, dtype=torch.float64)
