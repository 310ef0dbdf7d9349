"""sample.cfgpp: the scale schedule that it is for first-order solvers, and its other forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.cfgpp", {"guidance_scale": 0.4})])
GIVEN = {"label": torch.tensor([0, 1, 2, 2])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.labelled()


@pytest.fixture(scope="module")
def plus(denoiser: gw.Program) -> Sampler:
    return Sampler.of(gw.passes.sample.Cfgpp(guidance_scale=0.6)(denoiser))


@pytest.fixture(scope="module")
def cfg(denoiser: gw.Program) -> Sampler:
    return Sampler.of(gw.passes.sample.Cfg(guidance_scale=1.0)(denoiser))


def noise() -> torch.Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def test_it_is_cfg_with_a_growing_scale(plus: Sampler, cfg: Sampler) -> None:
    grid = {"spacing": "log_snr", "final": "none"}
    plan = plus.plan(4, GIVEN, steps=10, grid=grid)
    sigmas = [level.sigma for level in plan.path.levels]
    scales = [0.6 * a / (a - b) for a, b in itertools.pairwise(sigmas)]
    mine = plus.sample(noise(), GIVEN, steps=10, grid=grid)
    wanted = cfg.sample(noise(), GIVEN, steps=10, grid=grid, guidance_scale=scales)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_without_scale_it_is_unconditional(plus: Sampler, cfg: Sampler) -> None:
    for solver in ("euler", "dpmpp_2m", "dpmpp_2s"):
        mine = plus.sample(noise(), GIVEN, steps=6, guidance_scale=0.0, solver=solver)
        wanted = cfg.sample(noise(), GIVEN, steps=6, guidance_scale=0.0, solver=solver)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_multistep_is_the_published_formula(plus: Sampler) -> None:
    """x' = D_l - e^-h D_u + e^-h x + (1 - e^-h) (D_l - D_u_old) / (2 r) in s / a."""
    grid = {"spacing": "log_snr", "final": "none"}
    plan = plus.plan(4, GIVEN, steps=5, grid=grid, solver="dpmpp_2m")
    x, state, old, last_h = plus.first(plan, noise()), {}, None, None
    mine = x
    for i in range(5):
        seen = []
        here, there = plan.path.levels[i].sigma, plan.path.levels[i + 1].sigma
        mine, state = plus.step(plan, i, mine, state, watch=seen.append)
        data, unconditional = seen[0]["denoised"], x - here * seen[0]["noise"]
        h = math.log(here / there)
        moved = data - math.exp(-h) * unconditional + math.exp(-h) * x
        if old is not None:
            r = last_h / h
            moved = moved + (1 - math.exp(-h)) * (data - old) / (2 * r)
        x, old, last_h = moved, unconditional, h
        torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


def test_solvers_without_a_second_direction_are_refused(plus: Sampler) -> None:
    for name in ("heun", "unipc", "lcm"):
        with pytest.raises(ArgumentError, match=f"{name} has no form for sample.cfgpp"):
            plus.sample(noise(), GIVEN, steps=4, solver=name)
