"""sample.feynman_kac: the target of guidance in closed form, one permutation for all, refusals."""

from __future__ import annotations

import pytest
import torch
from models import denoisers
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.guidance import Weighted
from graphwright.ir.sampling.particles import reweighted
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.feynman_kac", {"exponent": 1.5, "other_exponent": -0.5})])
MEAN, VARIANCE = 12 / 7, 1 / 7
"""Of N(1.5, 0.25)^2 N(0, 1)^-1."""


class TwoNormals(nn.Module):
    """The noise of N(1.5, 0.25) for label 0, of N(0, 1) for label 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor([1.5, 0.0]))
        self.register_buffer("variances", torch.tensor([0.25, 1.0]))

    def forward(self, x: Tensor, sigma_in: Tensor, label: Tensor) -> Tensor:
        s = sigma_in[:, None]
        return s * (x - self.means[label][:, None]) / (self.variances[label][:, None] + s**2)


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    inputs = {
        "x": torch.randn(3, 1), "sigma_in": torch.tensor([0.2, 1.0, 5.0]),
        "label": torch.tensor([0, 1, 0]),
    }  # fmt: skip
    program = gw.trace(
        TwoNormals().eval(), inputs, {name: {0: "batch"} for name in inputs},
        ranges={"label": (0, 2), "sigma_in": (0.1, 10.0)},
    )  # fmt: skip
    schedule = {"kind": "edm", "sigma_min": 0.01, "sigma_max": 20.0, "time": "sigma"}
    return gw.passes.sample.Denoiser(
        schedule=schedule, grid={"spacing": "log_snr", "final": "none"}, solver="reverse_sde",
        unconditional={"label": 1},
    )(program)  # fmt: skip


def noise(rows: int) -> Tensor:
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))


def labels(rows: int) -> dict[str, Tensor]:
    return {"label": torch.zeros(rows, dtype=torch.int64)}


def test_particles_have_the_target(denoiser: gw.Program) -> None:
    weighted = Sampler.of(gw.passes.sample.FeynmanKac()(denoiser))
    plain = Sampler.of(gw.passes.sample.Cfg(guidance_scale=2.0)(denoiser))
    rows = 3000
    mine = weighted.sample(noise(rows), labels(rows), steps=200, seed=1, particles=rows)
    other = plain.sample(noise(rows), labels(rows), steps=200, seed=1)
    assert abs(float(mine.mean()) - MEAN) < 0.05
    assert abs(float(mine.var()) - VARIANCE) < 0.03
    assert abs(float(other.mean()) - MEAN) > 0.1  # 1.88, the guided SDE without weights


def test_groups_stay_apart(denoiser: gw.Program) -> None:
    sampler = Sampler.of(gw.passes.sample.FeynmanKac(resample_below=2.0)(denoiser))
    given = {"label": torch.tensor([0, 0, 0, 1, 1, 1])}
    plan = sampler.plan(6, given, steps=30, particles=3)
    x, state = sampler.first(plan, noise(6)), {}
    for i in range(30):
        x, state = sampler.step(plan, i, x, state, [noise(6)])
    assert state["log_weights"].shape == (6,)
    # label 1 is what guidance leads away from as well: its rate is 0, and its weights equal
    assert float(state["log_weights"][3:].abs().max()) < 1e-6
    assert float(state["log_weights"][:3].abs().max()) > 0


def test_refusals(denoiser: gw.Program) -> None:
    sampler = Sampler.of(gw.passes.sample.FeynmanKac()(denoiser))
    with pytest.raises(ArgumentError, match="6 rows are no groups of 4 particles"):
        sampler.sample(noise(6), labels(6), steps=4, seed=0, particles=4)
    with pytest.raises(ArgumentError, match="6 rows are no groups of 1 particles"):
        sampler.sample(noise(6), labels(6), steps=4, seed=0)
    with pytest.raises(ArgumentError, match="dpmpp_2m does not simulate it"):
        sampler.sample(noise(6), labels(6), steps=4, particles=3, solver="dpmpp_2m")
    cfg = Sampler.of(gw.passes.sample.Cfg()(denoiser))
    with pytest.raises(ArgumentError, match=r"particles are for programs of sample\.feynman_kac"):
        cfg.sample(noise(6), labels(6), steps=4, seed=0, particles=3)


def test_a_product_begins_with_its_own_variance(denoiser: gw.Program) -> None:
    """N(1.5, 0.25) N(0, 1) is N(1.2, 0.2); in noise of 1 it begins with half of the variance."""
    product = gw.passes.sample.FeynmanKac(exponent=1.0, other_exponent=1.0)(denoiser)
    sampler, rows = Sampler.of(product), 3000
    plan = sampler.plan(rows, labels(rows), steps=100, particles=rows, grid={
        "spacing": "log_snr", "final": "none", "start": 1.0})  # fmt: skip
    x = sampler.first(plan, noise(rows))
    torch.testing.assert_close(x, noise(rows) / 2**0.5)
    x = sampler.sample(noise(rows), labels(rows), steps=200, seed=1, particles=rows)
    assert abs(float(x.mean()) - 1.2) < 0.05
    assert abs(float(x.var()) - 0.2) < 0.03
    with pytest.raises(ArgumentError, match="cannot change on the way"):
        sampler.plan(4, labels(4), steps=2, particles=4, exponent=[1.0, 2.0])
    with pytest.raises(ArgumentError, match="no integral"):
        sampler.plan(4, labels(4), steps=2, particles=4, other_exponent=-1.0)
    with pytest.raises(ArgumentError, match="add up to more than 0"):
        gw.passes.sample.FeynmanKac(exponent=1.0, other_exponent=-1.0)


def test_rates_keep_their_digits_where_predictions_are_alike() -> None:
    """w (w - 1) |s - s'|^2 / 2 of guidance, in float32."""
    g = torch.Generator().manual_seed(0)
    with_, apart = (torch.randn(2, 3, 32, 32, generator=g) for _ in range(2))
    without = with_ - 1e-4 * apart
    levels = torch.full((2,), 0.6), torch.full((2,), 0.8)
    numbers = torch.tensor(2.5), torch.tensor(-1.5)
    *_, rate = Weighted()(with_, with_, with_, without, with_, *levels, *numbers)
    square = (with_.double() - without.double()).flatten(1).square().sum(1)
    torch.testing.assert_close(rate.double(), 2.5 * 1.5 / 2 * square / 0.64, rtol=1e-4, atol=0)


def test_kept_features_are_resampled_with_their_particles() -> None:
    network = denoisers.conv_denoiser(
        schedule={"kind": "vp", "time_scale": 999.0}, solver="reverse_sde",
        grid={"spacing": "uniform", "end": 0.01},
    )  # fmt: skip
    guided = gw.passes.sample.FeynmanKac(resample_below=2.0)(network)
    sampler = Sampler.of(gw.passes.sample.Reuse(modules=["middle"])(guided))
    plan = sampler.plan(2, {"label": torch.tensor([1, 1])}, steps=3, particles=2)
    assert sampler._doubled == {"cached.cached_0"}
    x = torch.arange(2.0)[:, None]
    state = {
        "cached.cached_0": torch.stack([x, 10 + x]), "cached_rows_of_both": torch.ones(()).bool(),
        "weight_rate": torch.zeros(2), "log_weights": torch.tensor([-50.0, 50.0]).double(),
    }  # fmt: skip
    moved, after = reweighted(plan, sampler.record, 0, x, state, sampler._doubled)
    assert moved.flatten().tolist() == [1.0, 1.0]  # the one with the weight
    assert after["cached.cached_0"].flatten().tolist() == [1.0, 1.0, 11.0, 11.0]
    noise = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    made = sampler.sample(noise, {"label": torch.full((6,), 1)}, steps=4, particles=3, seed=0)
    assert torch.isfinite(made).all()
    assert sampler.calls == {"full": 2, "full_shallow": 2}
