"""sample.cfgpp: the scale schedule that it is for first-order solvers, and its other forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.inversion import inverted
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


def test_inversion_changes_the_two_directions(plus: Sampler, denoiser: gw.Program) -> None:
    """z = (x - s' E_u) / a', x = a z + s E_l, step by step from two runs of the denoiser."""
    grid = {"spacing": "log_snr", "final": "none"}
    levels = plus.plan(4, GIVEN, steps=5, grid=grid).path.levels
    data = noise() / 2
    x = data
    for here, there in reversed(list(itertools.pairwise(levels))):
        s, one = torch.full((4,), here.s), torch.ones(4)
        own, other = (
            denoiser(x, s, label, one, s)["noise"]
            for label in (GIVEN["label"], torch.full_like(GIVEN["label"], 3))
        )
        x = (x - there.s * other) + here.s * (other + 0.6 * (own - other))
    mine = inverted(plus, data, GIVEN, steps=5, grid=grid)
    torch.testing.assert_close(mine, x / levels[0].s, rtol=1e-4, atol=1e-4)


def test_inversion_comes_back_nearer_than_with_cfg(plus: Sampler, cfg: Sampler) -> None:
    grid = {"spacing": "log_snr", "final": "none"}
    data = torch.tensor([[1.4, 0.2], [-0.9, 1.2], [0.1, -1.2], [0.2, -1.6]])

    def error(sampler: Sampler, steps: int, scale: float) -> float:
        given = {"steps": steps, "grid": grid, "guidance_scale": scale}
        back = sampler.sample(inverted(sampler, data, GIVEN, **given), GIVEN, **given)
        return float((back - data).norm())

    # 0.6 and 7.5 are a pair of scales of the paper
    assert error(plus, 20, 0.6) < 0.5 * error(cfg, 20, 7.5)
    errors = [error(plus, steps, 0.0) for steps in (20, 40, 80)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_what_cannot_be_inverted_is_refused(plus: Sampler, denoiser: gw.Program) -> None:
    for solver, options in (("dpmpp_2m", {}), ("ddim", {"eta": 0.5})):
        with pytest.raises(
            ArgumentError, match=r"only steps of euler \(ddim\) without fresh noise"
        ):
            inverted(plus, noise(), GIVEN, steps=4, solver=solver, solver_options=options)
    apg = Sampler.of(gw.passes.sample.Apg()(denoiser))
    with pytest.raises(ArgumentError, match=r"a step of sample\.apg goes by earlier ones"):
        inverted(apg, noise(), GIVEN, steps=4)


def test_a_distilled_network_is_not_guided_again() -> None:
    class Distilled(denoisers.ConvDenoiser):
        def forward(self, sample, timestep, label, w):
            return super().forward(sample, timestep, label) * (1 + w[:, None, None, None] / 10)

    inputs = dict(zip(("sample", "timestep", "label"), denoisers.conv().examples, strict=True))
    inputs["w"] = torch.tensor([2.0, 3.0])
    network = gw.trace(Distilled().eval(), inputs, {name: {0: "batch"} for name in inputs})
    given = {"unconditional": {"label": 4}, "distilled": "w"}
    program = gw.passes.sample.Denoiser(**given)(network)
    for name in ("Cfgpp", "AdaptiveGuidance", "LinearGuidance", "Cfg"):
        with pytest.raises(ModelError, match="takes their scale as 'w'; it has no prediction"):
            getattr(gw.passes.sample, name)()(program)
    with pytest.raises(ModelError, match="'x' of `distilled` is no condition"):
        gw.passes.sample.Denoiser(**{**given, "distilled": "x"})(network)
