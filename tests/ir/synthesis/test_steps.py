"""Adam against torch's, and P12's controllers against derivatives."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.synthesis.steps import Adam, AdaptiveWeight, adaptive_step, cosine


def test_adam_goes_where_torchs_adam_goes():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    gradients = torch.randn(20, 5, 3, dtype=torch.float64, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.9), eps=1e-8)
    adam, ours = Adam(), start.clone()
    for t, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = cosine(0.1, t, 20)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours -= cosine(0.1, t, 20) * adam.direction(gradient)
    assert torch.allclose(ours, theirs.detach(), rtol=1e-12, atol=0)


def _score(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x).flatten(1).sum(1)


def test_the_change_of_a_step_is_the_derivative_of_the_score_by_it():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    d = torch.randn(4, 6, dtype=torch.float64, generator=generator) / 4
    steps = adaptive_step(0.1, torch.cos(x), d)
    assert steps.shape == (4, 1)
    h = 1e-5
    slope = (_score(x - h * d) - _score(x + h * d)) / (2 * h)
    assert torch.allclose(steps[:, 0], 0.1 + 0.01 * slope, atol=1e-4 * 0.01)


def test_steps_stay_between_their_bounds():
    d = torch.tensor([[1000.0], [-1000.0]])
    assert adaptive_step(0.1, torch.ones(2, 1), d).flatten().tolist() == pytest.approx([1e-4, 0.5])


def test_a_small_step_grows_where_the_score_is_the_aim():
    """Steps to f(x) = -|x|^2 / 2 above -0.01, from a step that is too small."""

    def steps_needed(adaptive: bool) -> int:
        x, adam = torch.tensor([[2.0, -3.0]], dtype=torch.float64), Adam(betas=(0.9, 0.999))
        for count in range(2000):
            if float(x.square().sum()) < 0.02:
                return count
            d = adam.direction(x.clone())
            x = x - (adaptive_step(0.005, -x, d) if adaptive else 0.005) * d
        return 2000

    assert steps_needed(adaptive=True) < 0.6 * steps_needed(adaptive=False)


@pytest.mark.parametrize(("verifier", "rises"), [(-1.0, True), (1.0, False)])
def test_the_share_moves_towards_the_loss_that_the_score_agrees_with(verifier, rises):
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[-0.5, 1.0]])
    weight = AdaptiveWeight()
    after = weight.update(0.1, verifier * first, first, second)
    assert (after > 0.5) == rises
    assert after == pytest.approx(0.6 if rises else 0.4, abs=1e-6)  # Adam's first step is lr


def test_the_share_stays_a_share():
    weight = AdaptiveWeight()
    for _ in range(20):
        weight.update(0.1, torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    assert weight.gamma == 0.0
