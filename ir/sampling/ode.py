"""The probability-flow ODE: samples, codes of samples, and exact likelihood, by scipy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.schedule import SMALLEST, NoiseSchedule
from graphwright.ir.sampling.solvers.base import Denoise


class Solved(NamedTuple):
    """An end of the ODE.

    Attributes:
        x: the sample there, in the shape and dtype of the given one.
        evaluations: questions to the denoiser.
    """

    x: Tensor
    evaluations: int


def flow_ode(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x: Tensor,
    start: float,
    end: float,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Solved:
    """Follows dx/dt = a'(t) D + s'(t) E from `start` to `end`, adaptive Runge-Kutta 4(5).

    Args:
        denoise: the guided denoiser.
        schedule: a closed form.
        x: [batch, ...]; step sizes are chosen for the batch as a whole.
        start, end: times; from noise to data, or back for the code of a sample.
        rtol, atol: of scipy's `solve_ivp`.

    Raises:
        ArgumentError: the schedule is a table, an end has no noise, or the solver gave up.

    Source: Song et al. 2021 (P64), section 4.3, in the form that has no division by a or s.
    """

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(flat).reshape(x.shape).to(x.dtype)
        da, ds = schedule.slopes(t)
        p = denoise(at, schedule.level(t))
        return np.asarray((da * p.denoised + ds * p.noise).double().flatten().numpy())

    flat, count = _integrated(derivative, schedule, x.double().flatten().numpy(), start, end,
                              rtol, atol)  # fmt: skip
    return Solved(torch.from_numpy(flat).reshape(x.shape).to(x.dtype), count)


class Likelihood(NamedTuple):
    """Log-likelihoods of samples.

    Attributes:
        log_likelihood: [batch] float64, in nats.
        code: where the samples end in noise.
        evaluations: questions to the denoiser.
    """

    log_likelihood: Tensor
    code: Tensor
    evaluations: int


def likelihood(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x: Tensor,
    probes: Tensor,
    start: float,
    end: float,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Likelihood:
    """log p of samples under the probability-flow ODE, by the change of variables.

    Args:
        denoise: a denoiser that torch can differentiate.
        schedule: a closed form.
        x: samples [batch, ...].
        probes: [probes, batch, ...] of random signs: the divergence is the mean of e'Je over them
            (Skilling and Hutchinson). Unit vectors times the root of their number make it exact.
        start: time of the samples, near that of the data.
        end: time where the distribution is taken for normal with standard deviation s.
        rtol, atol: of scipy's `solve_ivp`.

    Raises:
        ArgumentError: as `flow_ode`.

    Source: Song et al. 2021 (P64), section 4.3 and appendix D.2.
    """
    batch = x.shape[0]

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(flat[:-batch]).reshape(x.shape).to(x.dtype).requires_grad_()
        da, ds = schedule.slopes(t)
        with torch.enable_grad():
            p = denoise(at, schedule.level(t))
            drift = da * p.denoised + ds * p.noise
            divergence = torch.zeros(batch, dtype=torch.float64)
            for e in probes:
                (back,) = torch.autograd.grad((drift * e).sum(), at, retain_graph=True)
                divergence += (back * e).flatten(1).sum(1).double() / len(probes)
        return np.concatenate([drift.detach().double().flatten().numpy(), divergence.numpy()])

    begin = np.concatenate([x.double().flatten().numpy(), np.zeros(batch)])
    flat, count = _integrated(derivative, schedule, begin, start, end, rtol, atol)
    code = torch.from_numpy(flat[:-batch]).reshape(x.shape)
    prior = schedule.level(end).s
    size = code[0].numel()
    log_prior = -(code**2).flatten(1).sum(1) / (2 * prior**2)
    log_prior = log_prior - size / 2 * math.log(2 * math.pi * prior**2)
    return Likelihood(log_prior + torch.from_numpy(flat[-batch:]), code.to(x.dtype), count)


def bits_per_dimension(log_likelihood: Tensor, size: int, offset: float = 7.0) -> Tensor:
    """Of images that were scaled to [-1, 1] from 8 bits; offset 8 for [0, 1]."""
    return -log_likelihood / (size * math.log(2)) + offset


def _integrated(
    derivative: Any, schedule: NoiseSchedule, begin: np.ndarray, start: float, end: float,
    rtol: float, atol: float,
) -> tuple[np.ndarray, int]:  # fmt: skip
    from scipy.integrate import solve_ivp

    schedule.slopes(end)
    for t in (start, end):
        if schedule.level(t).s <= SMALLEST:
            raise ArgumentError(
                f"at t = {t:g} there is no noise, and the ODE divides by it",
                fix="End a little above: 1e-5 or 1e-3.",
            )
    found = solve_ivp(derivative, (start, end), begin, rtol=rtol, atol=atol, method="RK45")
    if not found.success:
        raise ArgumentError(f"the ODE was not solved: {found.message}")
    return np.asarray(found.y[:, -1]), int(found.nfev)
