"""tune.guidance_distill: P15's target in closed form, the embedding at zero, one row per step."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models import planar
from models.mixture import mixture
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.training import Levels, Training
from graphwright.ir.tune import Moment
from graphwright.ir.tune.hooks import Values
from graphwright.passes.tune import GuidanceDistill
from graphwright.passes.tune.guidance_distill import SCALE, Guided, guided

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("tune.guidance_distill", {"tune": {"steps": 1}, "width": 16})])


def closed_form(x: Tensor, sigma: Tensor, label: Tensor, scale: Any) -> Tensor:
    """The guided prediction of the mixture, in float64."""
    exact = mixture()
    x, s = x.double(), sigma.double()[:, None]
    one = torch.eye(3, dtype=torch.float64).clamp_min(1e-30).log()
    data = exact.denoised(x, torch.ones_like(s), s, one[label])
    other = exact.denoised(x, torch.ones_like(s), s)
    return other + torch.as_tensor(scale).double().reshape(-1, 1) * (data - other)


@cache
def questions() -> tuple[Tensor, Tensor, Tensor]:
    """Samples, levels and labels, 500 each."""
    g = torch.Generator().manual_seed(5)
    (batch,) = planar.data(1, 500, seed=9)
    sigma = (-1.2 + 1.2 * torch.randn(500, generator=g)).exp().clamp(0.05, 10.0)
    x = batch["sample"] + sigma[:, None] * torch.randn(500, 2, generator=g)
    return x, sigma, batch["label"]


@cache
def student() -> gw.Program:
    """Trained for a moment, with an average."""
    options = {"steps": 200, "lr": 1e-2, "ema": 0.98}
    made = GuidanceDistill(scale_max=4.0, width=16, tune=options)
    return made(planar.corrected(), training=planar.data())


class Deaf(Guided):
    """Follows the same predictions, and is told the mean scale whatever it is."""

    def on_batch(self, at: Moment, batch: Values) -> Values:
        made = super().on_batch(at, batch)
        return {**made, SCALE: torch.full_like(made[SCALE], 2.5)}


def answer(program: gw.Program, scale: Any) -> Tensor:
    """D of a student."""
    x, sigma, label = questions()
    ones = torch.ones_like(sigma)
    given = (x, sigma, label, ones, sigma, torch.as_tensor(scale, dtype=torch.float32))
    return program.run_flat(given)[0].detach().double()


def test_the_target_is_the_guided_prediction_in_closed_form() -> None:
    training = Training(planar.corrected(), "test")
    x, sigma, label = questions()
    levels = Levels(torch.ones_like(sigma), sigma, sigma.double())
    scales = torch.linspace(0.0, 6.0, 500)
    teacher = training.teacher(training.program, torch.device("cpu"))
    found = guided(teacher, training, x, levels, {"label": label}, scales)
    wanted = closed_form(x, sigma, label, scales)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4  # 6 times float32 D


def test_before_training_it_is_the_network_with_the_condition_at_every_scale() -> None:
    options = {"steps": 1, "lr": 1e-12}
    made = GuidanceDistill(tune=options)(planar.corrected(), training=planar.data(1))
    x, sigma, label = questions()
    wanted = planar.corrected().run_flat((x, sigma, label, torch.ones_like(sigma), sigma))[0]
    for scale in (1.0, 3.0, 5.0):
        torch.testing.assert_close(answer(made, scale), wanted.double(), rtol=0, atol=1e-5)


def test_it_learns_the_scale_and_beats_a_network_that_is_not_told_it(monkeypatch) -> None:
    x, sigma, label = questions()
    scales = 1 + 3 * torch.rand(500, generator=torch.Generator().manual_seed(6))
    wanted = closed_form(x, sigma, label, scales)

    def error(found: Tensor) -> float:
        return float((found - wanted).square().sum(1).mean())

    mine = error(answer(student(), scales))
    assert mine < 0.35 * error(closed_form(x, sigma, label, 1.0))  # where it began
    with monkeypatch.context() as patch:
        patch.setattr("graphwright.passes.tune.guidance_distill.Guided", Deaf)
        deaf = student.__wrapped__()
    assert mine < 0.75 * error(answer(deaf, 2.5))


def test_it_samples_with_guidance_in_one_row_of_the_network_per_step(tmp_path) -> None:
    labels = {"label": torch.arange(30) % 3}
    noise = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    sampler = Sampler.of(student())
    default = sampler.sample(noise, labels, steps=6)
    assert sampler.evaluations == 6
    cfg = Sampler.of(gw.passes.sample.Cfg(guidance_scale=2.0)(planar.corrected()))
    wanted = cfg.sample(noise, labels, steps=6)
    plain = Sampler.of(planar.corrected()).sample(noise, labels, steps=6)
    assert float((default - wanted).norm()) < 0.5 * float((plain - wanted).norm())
    assert torch.equal(default, sampler.sample(noise, labels, steps=6, guidance_scale=2.0))
    with pytest.warns(UserWarning, match="learned from 1 to 4 and is asked outside"):
        sampler.sample(noise, labels, steps=1, guidance_scale=5.0)
    gw.lower(student(), "onnxruntime").save(tmp_path)
    bundle = gw.load(tmp_path)
    torch.testing.assert_close(bundle.sample(noise, labels, steps=6), default, rtol=0, atol=2e-3)
    assert list(bundle.parts) == ["full"]


def test_no_guidance_goes_around_it() -> None:
    with pytest.raises(ModelError, match=r"tune.guidance_distill has put guidance around"):
        gw.passes.sample.Cfg()(student())


def test_refusals() -> None:
    for changes, said in (
        ({"conditions": {"label": None}}, "no number stands for the lack of 'label'"),
        ({"distilled": "label"}, "guides by itself already"),
        ({"conditions": {}}, "no condition to guide by"),
        ({"time": None}, "no linear layer of this network sees the time alone"),
    ):
        program = planar.otherwise(planar.corrected(), **changes)
        with pytest.raises(ModelError, match=said):
            GuidanceDistill()(program, training=planar.data(1, 4))
    for options, said in (
        ({"scale_max": 1.0}, "scale_max has to be above scale_min"),
        ({"guidance_scale": 9.0}, "guidance_scale 9 is outside of 1 to 5"),
        ({"width": 15}, "the width of the waves is even"),
        ({"tune": {"loss": "mse"}}, "own"),
    ):
        with pytest.raises(ArgumentError, match=said):
            GuidanceDistill(**options)
