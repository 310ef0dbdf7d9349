"""tune.f_distill: weights against the divergences' definitions, and a generator of one step."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from models import planar
from models.mixture import mixture
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.training import Training
from graphwright.ir.tune import Moment
from graphwright.passes.tune import Ddgan, FDistill, GuidanceDistill
from graphwright.passes.tune._denoisers.divergences import SECOND, Ratios, matched, weights
from graphwright.passes.tune._denoisers.few import jumps
from graphwright.passes.tune.f_distill import Game

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}, "parameterization": "v"})
CHAIN = ("denoiser", [DENOISER, ("tune.f_distill", {"tune": {"steps": 3}, "student_every": 2})])

DEFINED = {
    "reverse_kl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "softened_reverse_kl": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / r,
}
"""f of D_f = E_student f(teacher / student)."""


@pytest.mark.parametrize("name", SECOND)
def test_weights_are_the_second_derivative_of_the_divergence(name: str) -> None:
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(DEFINED[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(SECOND[name](r.detach()), (second * r**2).detach())
    one = torch.ones(1, dtype=torch.float64)
    assert float(DEFINED[name](one)) == 0, "equal distributions do not diverge"


@pytest.mark.parametrize("name", SECOND)
def test_the_direction_is_the_gradient_of_the_divergence(name: str) -> None:
    """Of a Gaussian student G(z) = m + c z from N(0, 1), at one level, all by quadrature."""
    sigma, at = 0.7, torch.linspace(-12, 12, 4001, dtype=torch.float64)
    step = float(at[1] - at[0])

    def log_density(x: Tensor, mean: Tensor | float, spread: Tensor | float) -> Tensor:
        v = torch.as_tensor(spread, dtype=torch.float64) ** 2 + sigma**2
        return -((x - mean) ** 2) / (2 * v) - 0.5 * (2 * math.pi * v).log()

    m, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.8))
    student, teacher = log_density(at, m, c), log_density(at, 0.0, 1.0)
    divergence = (student.exp() * DEFINED[name]((teacher - student).exp())).sum() * step
    exact = torch.autograd.grad(divergence, (m, c))
    # E of h(r) (D_fake - D_teacher) / sigma^2 dG over z and e, with x = m + c z + sigma e; given x,
    # z has the mean c (x - m) / (c^2 + sigma^2)
    with torch.no_grad():
        ratio = (teacher - student).exp()
        fake = at + sigma**2 * -(at - m) / (c**2 + sigma**2)
        real = at + sigma**2 * -at / (1 + sigma**2)
        push = SECOND[name](ratio) * (fake - real) / sigma**2 * student.exp() * step
        found = push.sum(), (push * c * (at - m) / (c**2 + sigma**2)).sum()
    torch.testing.assert_close(torch.stack(found), torch.stack(exact), rtol=1e-3, atol=1e-6)


def test_the_loss_moves_samples_along_the_weighted_difference() -> None:
    g = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(6, 2, 3, generator=g, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    ratios = torch.rand(6, generator=g, dtype=torch.float64) + 0.5
    weight = weights("js", ratios).requires_grad_()
    assert float(weight.detach().mean()) == pytest.approx(1.0)
    (found,) = torch.autograd.grad(matched(x, real, fake, weight), x)
    for row in range(6):
        h = float(ratios[row] / (1 + ratios[row]))
        mean = sum(float(r / (1 + r)) for r in ratios) / 6
        size = float((x[row] - real[row]).detach().abs().mean()) + 1e-6
        expected = h / mean / size * (fake[row] - real[row]) / x.numel()
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights("reverse_kl", ratios), torch.ones_like(ratios)), "that is DMD2"


def test_ratios_have_the_mean_one_in_every_bin() -> None:
    ratios = Ratios(4, 0.5, torch.device("cpu"))
    logits = torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0])
    times = torch.tensor([0.1, 0.2, 0.9, 1.0, 0.95])
    found = ratios(logits, times)
    raw = [1.0, math.e, math.exp(-1), 20.0, 0.1]
    means = [(1 + math.e) / 2, 0.0, 0.0, (math.exp(-1) + 20.1) / 3]
    torch.testing.assert_close(ratios.means, torch.tensor(means))
    own = [means[0], means[0], means[3], means[3], means[3]]
    torch.testing.assert_close(found, torch.tensor([r / m for r, m in zip(raw, own, strict=True)]))
    ratios(torch.zeros(1), torch.zeros(1))
    assert float(ratios.means[0]) == pytest.approx(0.5 * means[0] + 0.5)
    assert float(ratios.means[3]) == pytest.approx(means[3])


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two sets of samples: zero for equal distributions."""
    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


OPTIONS = {
    "divergence": "kl", "student_every": 3, "fake": {"lr": 3e-3},
    "critic": {"lr": 2e-3, "width": 32}, "gan_weight": 0.01,
    "tune": {"steps": 240, "lr": 3e-3, "ema": 0.9},
}  # fmt: skip


@cache
def generator() -> gw.Program:
    return FDistill(**OPTIONS)(planar.corrected(), training=planar.data())


def drawn(program: gw.Program, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Samples, and as many of the data with the same labels."""
    g = torch.Generator().manual_seed(seed)
    (real,) = planar.data(1, 1500, seed=17)
    noise = torch.randn(1500, 2, generator=g)
    made = Sampler.of(program).sample(noise, {"label": real["label"]}, steps=1)
    return made, real["sample"]


def test_one_step_has_the_distribution_of_the_data() -> None:
    start, found = energy(*drawn(planar.corrected())), energy(*drawn(generator()))
    again = mixture(torch.float32).sample(1500, torch.Generator().manual_seed(5))
    least = energy(again, drawn(generator())[1])
    assert found < 0.2 * start
    assert found < 20 * least


def test_the_bundle_samples_in_the_one_step_that_it_was_made_for(tmp_path) -> None:
    labels = {"label": torch.arange(30) % 3}
    noise = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    sampler = Sampler.of(generator())
    made = sampler.sample(noise, labels)
    assert sampler.evaluations == 1
    level = torch.full((30,), 10.0)
    x, ones = noise * 10.0, torch.ones(30)
    wanted = generator().run_flat((x, level, labels["label"], ones, level))[0]
    torch.testing.assert_close(made, wanted.detach())
    gw.lower(generator(), "onnxruntime").save(tmp_path)
    torch.testing.assert_close(gw.load(tmp_path).sample(noise, labels), made, rtol=0, atol=1e-4)


def test_guidance_of_the_teacher_is_what_is_followed() -> None:
    training = Training(planar.corrected(), "test")
    start = training.path(jumps(training, 1), 1).levels[0]
    losses = []
    for scale in (1.0, 3.0):
        options = FDistill(guidance_scale=scale).options
        game = Game(training, Context(), options, start)
        (batch,) = planar.data(1, 64)
        at = Moment(0, 5, 0, {}, torch.optim.SGD([torch.zeros(1)], lr=1.0))
        x = batch["sample"].clone().requires_grad_()
        given = {**batch, "real samples": x.detach()}
        loss = game.on_loss(at, torch.zeros(()), {"denoised": x, "noise": x}, given)
        losses.append(float(loss.detach()))
    assert losses[0] < 0.1 * losses[1], "the copy is the teacher as long as nothing has learned"


def test_a_denoiser_that_guides_by_itself_is_followed_at_its_scales() -> None:
    wide = GuidanceDistill(width=8, tune={"steps": 1})(planar.corrected(), training=planar.data(1))
    options = {"student_every": 2, "tune": {"steps": 3}}
    made = FDistill(**options)(wide, training=planar.data(1, 16))
    labels, noise = {"label": torch.tensor([0, 1])}, torch.randn(2, 2)
    assert Sampler.of(made).sample(noise, labels, guidance_scale=3.0).shape == (2, 2)
    with pytest.raises(ModelError, match="guides by itself"):
        FDistill(guidance_scale=2.0)(wide, training=planar.data(1, 16))
    with pytest.raises(ModelError, match="would train it away"):
        Ddgan()(wide, training=planar.data(1, 16))


def test_a_killed_run_goes_on(tmp_path, monkeypatch) -> None:
    recipe = FDistill(**{**OPTIONS, "ratio_ema": 0.5, "tune": {"steps": 7}})
    given = {"training": planar.data(3, 16), "scope": ("test",)}
    straight = recipe.execute(planar.corrected(), Context(**given))
    whole = Game.on_loss

    def killed(self, at, *rest):
        if at.step == 5:
            raise KeyboardInterrupt
        return whole(self, at, *rest)

    work = Context(**given, work=tmp_path, checkpoint_seconds=0.0)
    monkeypatch.setattr(Game, "on_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.execute(planar.corrected(), work)
    monkeypatch.setattr(Game, "on_loss", whole)
    resumed = recipe.execute(planar.corrected(), work)
    assert resumed.metrics == straight.metrics
    for name, tensor in straight.program.state.items():
        assert torch.equal(resumed.program.state[name], tensor), name


def test_refusals() -> None:
    for options, said in (
        ({"gan_weight": 0.0}, "greater than 0"),
        ({"tune": {"accumulate": 2}}, "leave accumulate at 1"),
        ({"tune": {"optimizer": "mfac"}}, "choose another optimizer"),
        ({"divergence": "wasserstein"}, "divergence"),
    ):
        with pytest.raises(ArgumentError, match=said):
            FDistill(**options)
    none = planar.otherwise(planar.corrected(), conditions={})
    with pytest.raises(ModelError, match="no condition to guide by"):
        FDistill(guidance_scale=2.0)(none, training=planar.data(1, 4))
