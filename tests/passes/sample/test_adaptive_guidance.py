"""sample.adaptive_guidance: CFG where it never ends, one evaluation per step where it has."""

from __future__ import annotations

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.sampling.guidance import Adaptive
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.adaptive_guidance", {"threshold": 0.9})])
GIVEN = {"label": torch.tensor([0, 1, 2, 2])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.labelled()


def noise() -> torch.Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def adaptive(denoiser: gw.Program, threshold: float, space: str = "x0") -> Sampler:
    step = gw.passes.sample.AdaptiveGuidance(
        guidance_scale=2.0, threshold=threshold, similarity_space=space
    )
    return Sampler.of(step(denoiser))


def test_a_threshold_above_one_is_cfg_bit_for_bit(denoiser: gw.Program) -> None:
    mine = adaptive(denoiser, 1.1)
    cfg = Sampler.of(gw.passes.sample.Cfg(guidance_scale=2.0)(denoiser))
    found = [s.sample(noise(), GIVEN, steps=7, solver="dpmpp_2m") for s in (mine, cfg)]
    assert torch.equal(*found)
    assert mine.evaluations == cfg.evaluations == 14


@pytest.mark.parametrize("space", ["epsilon", "x0", "velocity"])
def test_the_least_threshold_leaves_one_guided_step(denoiser: gw.Program, space: str) -> None:
    mine = adaptive(denoiser, -1.1, space)
    mine.sample(noise(), GIVEN, steps=7)
    assert mine.evaluations == 8


def test_it_ends_when_the_least_similar_sample_is_alike_and_stays_ended(
    denoiser: gw.Program,
) -> None:
    never = adaptive(denoiser, 1.1)
    plan = never.plan(4, GIVEN, steps=9)
    x, state, seen = never.first(plan, noise()), {}, []
    for i in range(9):
        x, state = never.step(plan, i, x, state, watch=lambda out: seen.append(out["similarity"]))
    least = [float(each.min()) for each in seen]
    threshold = sorted(least)[4]
    first = next(i for i, value in enumerate(least) if value >= threshold)
    mine = adaptive(denoiser, threshold)
    mine.sample(noise(), GIVEN, steps=9)
    assert mine.evaluations == 2 * (first + 1) + (9 - first - 1)
    assert 0 < first < 8


def test_the_program_returns_the_cosine(denoiser: gw.Program) -> None:
    made = gw.passes.sample.AdaptiveGuidance(similarity_space="epsilon")(denoiser)
    found = made(*made.examples)["similarity"]
    x, t, label, a, s = denoiser.examples
    one, two = (denoiser(x, t, y, a, s)["noise"] for y in (label, torch.full_like(label, 3)))
    torch.testing.assert_close(found, torch.cosine_similarity(one, two), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["epsilon", "x0", "velocity"])
def test_predictions_of_zeros_end_nothing(space: str) -> None:
    zeros, x, level = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2,), 0.5)
    *_, cosine = Adaptive(space)(zeros, zeros, zeros, zeros, x, level, level, torch.tensor(2.0))
    assert torch.equal(cosine, torch.zeros(2))
