"""The chain against a known distribution, the discriminator against a known ratio."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize

from graphwright.ir.errors import ModelError
from graphwright.ir.synthesis.chain import accepted, discriminator, logistic


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_states_are_distributed_as_real_samples():
    """On a grid of 12 places with known p and q, D = p / (p + q), 2e4 offers drawn from q."""
    x = torch.linspace(-2, 2, 12, dtype=torch.float64)
    p, q = torch.exp(-((x - 0.7) ** 2) * 2), torch.exp(-((x + 0.3) ** 2) / 2)
    p, q = p / p.sum(), q / q.sum()
    offers = torch.multinomial(q, 20000, replacement=True, generator=generator())
    d = p / (p + q)
    states = [s for s in accepted(float(d[7]), d[offers], generator(1)) if s >= 0]
    found = torch.bincount(offers[torch.tensor(states)], minlength=12).double() / len(states)
    kl = float((found * (found.clamp_min(1e-12) / p).log()).sum())
    assert kl < 0.02
    assert float((q * (q / p).log()).sum()) > 0.3  # what no filter would leave


def test_a_constant_discriminator_accepts_everything():
    assert accepted(0.3, torch.full((50,), 0.3), generator()) == list(range(50))


def test_a_chain_begins_at_the_real_sample_and_stays_where_it_is():
    assert accepted(0.999999, torch.full((5,), 1e-6), generator()) == [-1] * 5
    assert accepted(0.5, torch.tensor([0.999999, 1e-6, 1e-6]), generator()) == [0, 0, 0]


def test_probabilities_of_0_and_1_are_no_division_by_0():
    found = accepted(1.0, torch.tensor([0.0, 1.0, 0.0]), generator())
    assert found == [-1, 1, 1]


def test_logistic_regression_is_the_minimum_that_scipy_finds():
    rows = torch.randn(60, 4, dtype=torch.float64, generator=generator())
    truth = (rows[:, 0] + torch.randn(60, dtype=torch.float64, generator=generator(1)) > 0).double()
    weight = torch.rand(60, dtype=torch.float64, generator=generator(2)) + 0.5

    def loss(b):
        score = rows.numpy() @ b * (2 * truth.numpy() - 1)
        return float((weight.numpy() * torch.nn.functional.softplus(-torch.tensor(score)).numpy()
                      ).sum() + 0.5 * 0.7 * (b**2).sum())  # fmt: skip

    expected = minimize(loss, [0.0] * 4, tol=1e-12).x
    assert logistic(rows, truth, weight, 0.7).tolist() == pytest.approx(list(expected), abs=1e-5)


def test_the_discriminator_is_calibrated():
    """Two normal distributions a unit apart, of unequal numbers: D is the sigmoid of x - 1/2."""
    real = 1 + torch.randn(900, 1, dtype=torch.float64, generator=generator(0))
    made = torch.randn(300, 1, dtype=torch.float64, generator=generator(1))
    of_real, of_made = discriminator(real, made, generator(2))
    for rows, found in ((real, of_real), (made, of_made)):
        expected = (rows[:, 0] - 0.5).sigmoid()
        assert float((found - expected).abs().mean()) < 0.04


def test_a_discriminator_without_doubt_is_refused():
    real = torch.zeros(400, 2, dtype=torch.float64)
    made = torch.ones(400, 2, dtype=torch.float64)
    noise = 1e-3 * torch.randn(400, 2, dtype=torch.float64, generator=generator())
    with pytest.raises(ModelError, match="tells made from real images for certain"):
        discriminator(real + noise, made + noise.flip(0), generator())


def test_too_few_images_are_refused():
    with pytest.raises(ModelError, match="these are 4 and 30"):
        discriminator(torch.randn(4, 2), torch.randn(30, 2), generator())
