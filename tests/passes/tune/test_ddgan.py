"""tune.ddgan: the posterior by brute force, and few steps that no regression of the data takes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from models import planar
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.grid import END
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.schedule import Level, NoiseSchedule
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.solvers.table import make_solver
from graphwright.ir.sampling.training import Training
from graphwright.passes.tune import Ddgan
from graphwright.passes.tune._denoisers.few import jumps
from graphwright.passes.tune._denoisers.posterior import Pairs
from graphwright.passes.tune.ddgan import Pairing

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}, "parameterization": "x0"})
OPTIONS = {"tune": {"steps": 2}, "latent": 6, "latent_width": 8, "critic": {"width": 8}}
CHAIN = ("denoiser", [DENOISER, ("tune.ddgan", OPTIONS)])

VP = NoiseSchedule(kind="vp")
LEVELS = tuple(VP.level(t) for t in (1.0, 0.75, 0.5, 0.25))


def pair(here: Level, there: Level, n: int = 1) -> Pairs:
    return Pairs.of([here] * n, [there] * n)


@pytest.mark.parametrize("i", range(4))
def test_the_posterior_is_the_conditional_of_the_forward_process(i: int) -> None:
    """x' and x given x0 are jointly Gaussian; their covariance by the matrix of the draws."""
    here, there = LEVELS[i], (*LEVELS, END)[i + 1]
    pairs, data = pair(here, there), torch.tensor([[1.7]], dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    mean = [float(part) for part in pairs.drawn(data, zero, zero)]
    draws = np.array(
        [[float(part) - m for part, m in zip(pairs.drawn(data, *given), mean, strict=True)]
         for given in ((one, zero), (zero, one))]
    ).T  # fmt: skip
    covariance = draws @ draws.T
    assert mean[1] == pytest.approx(here.a * 1.7, rel=1e-12)
    assert covariance[1, 1] == pytest.approx(here.s**2, rel=1e-12)
    assert covariance[0, 0] == pytest.approx(there.s**2, abs=1e-12)
    x = torch.tensor([[0.3]], dtype=torch.float64)
    slope = covariance[0, 1] / covariance[1, 1]
    expected = mean[0] + slope * (0.3 - mean[1])
    spread = max(covariance[0, 0] - slope * covariance[0, 1], 0.0) ** 0.5
    assert float(pairs.posterior(data, x, zero)) == pytest.approx(expected, rel=1e-10)
    found = float(pairs.posterior(data, x, one) - pairs.posterior(data, x, zero))
    assert found == pytest.approx(spread, abs=1e-7)


def test_it_is_ancestral_sampling_and_the_ddpm_posterior_of_a_table() -> None:
    g = torch.Generator().manual_seed(0)
    x, data, noise = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(3))
    solver, path = make_solver("euler", eta=1.0), Path(VP, (*LEVELS, END))
    abar = [level.a**2 for level in LEVELS] + [1.0]
    for i, here in enumerate(LEVELS):
        said = Prediction(data, (x - here.a * data) / here.s)
        wanted, _ = solver.step(lambda _x, _level, p=said: p, x, path, i, {}, [noise])
        found = pair(here, path.levels[i + 1], 5).posterior(data, x, noise)
        torch.testing.assert_close(found, wanted)
        beta = 1 - abar[i] / abar[i + 1]
        mean = (
            beta * abar[i + 1] ** 0.5 / (1 - abar[i]) * data
            + (1 - abar[i + 1]) * (1 - beta) ** 0.5 / (1 - abar[i]) * x
        )
        spread = (beta * (1 - abar[i + 1]) / (1 - abar[i])) ** 0.5
        torch.testing.assert_close(found, mean + spread * noise)


def test_an_oracle_of_the_data_reproduces_the_forward_process() -> None:
    """A chain whose generator knows x0 has the moments of q(x' | x0) at every level."""
    g = torch.Generator().manual_seed(1)
    data = torch.full((20000, 1), 0.8, dtype=torch.float64)
    x = LEVELS[0].a * data + LEVELS[0].s * torch.randn(20000, 1, generator=g, dtype=torch.float64)
    for i, here in enumerate(LEVELS):
        there = (*LEVELS, END)[i + 1]
        noise = torch.randn(20000, 1, generator=g, dtype=torch.float64)
        x = pair(here, there, 20000).posterior(data, x, noise)
        assert float(x.mean()) == pytest.approx(there.a * 0.8, abs=0.03)
        assert float(x.std()) == pytest.approx(there.s, abs=0.02)
    assert torch.equal(x, data), "no noise is left behind the last step"


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two sets of samples: zero for equal distributions."""
    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def whole(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The data without its labels: three modes at once."""
    return [{**b, "label": torch.full_like(b["label"], planar.WHOLE)} for b in batches]


@cache
def made() -> gw.Program:
    options = {
        "steps": 2, "latent": 4, "latent_width": 32, "r1_gamma": 0.05,
        "critic": {"lr": 4e-3, "width": 48},
        "tune": {"steps": 300, "lr": 4e-3, "min_lr": 1e-4, "ema": 0.9},
    }  # fmt: skip
    return Ddgan(**options)(planar.corrected(), training=whole(planar.data()))


def test_two_steps_are_nearer_to_the_data_than_those_of_the_best_regression() -> None:
    """The exact denoiser is what no regression of the data in these steps does better than."""
    g = torch.Generator().manual_seed(3)
    (real,) = whole(planar.data(1, 1500, seed=17))
    labels, noise = {"label": real["label"]}, torch.randn(1500, 2, generator=g)
    best = Sampler.of(planar.corrected()).sample(
        noise, labels, steps=2, solver="euler", solver_options={"eta": 1.0}, seed=5,
        grid=jumps(Training(planar.corrected(), "test"), 2),
    )  # fmt: skip
    found = Sampler.of(made()).sample(noise, labels, seed=5)
    assert energy(found, real["sample"]) < 0.9 * energy(best, real["sample"])


def test_the_driver_draws_a_latent_for_every_step(tmp_path) -> None:
    labels = {"label": torch.arange(30) % 3}
    noise = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    sampler = Sampler.of(made())
    found = sampler.sample(noise, labels, seed=1)
    assert sampler.evaluations == 2
    assert torch.equal(found, sampler.sample(noise, labels, seed=1))
    assert not torch.equal(found, sampler.sample(noise, labels, seed=2))
    g = torch.Generator().manual_seed(8)
    drawn = [torch.randn(30, size, generator=g) for size in (2, 4, 2, 4)]
    given = sampler.sample(noise, labels, step_noise=drawn)
    others = [*drawn[:3], drawn[3].flip(0)]  # the last step has nothing fresh but the latent
    assert not torch.allclose(given, sampler.sample(noise, labels, step_noise=others), atol=1e-3)
    others = [*drawn[:2], drawn[2].flip(0), drawn[3]]
    assert torch.equal(given, sampler.sample(noise, labels, step_noise=others))
    plan, x, state = sampler.plan(30, labels), sampler.first(sampler.plan(30, labels), noise), {}
    for i in range(2):
        x, state = sampler.step(plan, i, x, state, drawn[2 * i : 2 * i + 2])
    assert torch.equal(x, given)
    gw.lower(made(), "onnxruntime").save(tmp_path)
    bundle = gw.load(tmp_path).sample(noise, labels, step_noise=drawn)
    torch.testing.assert_close(bundle, given, rtol=0, atol=1e-3)
    with pytest.raises(ArgumentError, match="draw it by"):
        sampler.sample(noise, labels)
    with pytest.raises(ArgumentError, match=r"latent has the shape \(30, 2\)"):
        sampler.sample(noise, labels, step_noise=[*drawn[:3], drawn[2]])
    with pytest.raises(ArgumentError, match="the steps use 4 tensors of noise, and 3 are given"):
        sampler.sample(noise, labels, step_noise=drawn[:3])


def test_a_killed_run_goes_on(tmp_path, monkeypatch) -> None:
    recipe = Ddgan(**{**OPTIONS, "steps": 2, "r1_every": 2, "tune": {"steps": 5}})
    given = {"training": planar.data(3, 16), "scope": ("test",)}
    straight = recipe.execute(planar.corrected(), Context(**given))
    work = Context(**given, work=tmp_path, checkpoint_seconds=0.0)
    whole = Pairing.on_loss

    def killed(self, at, *rest):
        if at.step == 3:
            raise KeyboardInterrupt
        return whole(self, at, *rest)

    monkeypatch.setattr(Pairing, "on_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.execute(planar.corrected(), work)
    monkeypatch.setattr(Pairing, "on_loss", whole)
    resumed = recipe.execute(planar.corrected(), work)
    assert resumed.metrics == straight.metrics
    for name, tensor in straight.program.state.items():
        assert torch.equal(resumed.program.state[name], tensor), name


def test_refusals() -> None:
    data = planar.data(1, 4)
    for options, said in (
        ({"tune": {"accumulate": 2}}, "leave accumulate at 1"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"latent": 0}, "greater than or equal to 1"),
        ({"tune": {"loss": "mse"}}, "own"),
    ):
        with pytest.raises(ArgumentError, match=said):
            Ddgan(**options)
    with pytest.raises(ModelError, match="no linear layer of this network sees the time alone"):
        Ddgan()(planar.otherwise(planar.corrected(), time=None), training=data)
    with pytest.raises(ModelError, match="has put guidance around"):
        Ddgan()(gw.passes.sample.Cfg()(planar.corrected()), training=data)


def test_passes_behind_it_draw_the_latent_or_are_refused() -> None:
    data = planar.data(1, 16)
    made = Ddgan(**OPTIONS)(planar.corrected(), training=data)
    noise, labels = torch.randn(4, 2), {"label": torch.arange(4)}
    sample = gw.passes.sample
    for guided in (
        sample.Cfg(guidance_scale=2.0)(made),
        sample.LinearGuidance(guidance_scale=2.0, steps=4, trajectories=8)(made),
    ):
        found = Sampler.of(guided).sample(noise, labels, seed=3)
        assert found.shape == noise.shape
        assert found.isfinite().all()
    with pytest.raises(ModelError, match="a stream draws none"):
        sample.Stream(steps=[0.9, 0.4], boundary=False)(made)
    with pytest.raises(ModelError, match="with a latent have no scores"):
        sample.Minority()(made, calibration=data)
    with pytest.raises(ModelError, match="this denoiser is told more"):
        Ddgan(**OPTIONS)(made, training=data)
