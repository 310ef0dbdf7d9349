"""P12's two losses against loops over samples in float64."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.synthesis.kernels import backward_losses, bidirectional, forward_losses


def parts(n: int = 7, d: int = 5, k: int = 2, m: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, d), (n, k), (m, d), (m, k))
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def test_forward_is_the_formula():
    phi, y, made, targets = parts()
    kernel = torch.tensor([[float(a @ b) for b in phi] for a in phi], dtype=torch.float64)
    beta = 1e-6 * float(torch.trace(kernel)) / len(phi)
    alpha = torch.linalg.inv(kernel + beta * torch.eye(len(phi), dtype=torch.float64)) @ y
    for row, found in enumerate(forward_losses(phi, y, made, targets)):
        predicted = sum(float(made[row] @ phi[i]) * alpha[i] for i in range(len(phi)))
        expected = ((predicted - targets[row]) ** 2).mean()
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_backward_is_the_formula():
    phi, y, made, targets = parts()
    for row, found in enumerate(backward_losses(phi, y, made, targets)):
        own = float(made[row] @ made[row])
        total = 0.0
        for i in range(len(phi)):
            for j in range(y.shape[1]):
                weight = float(phi[i] @ made[row]) / (own + 1e-6 * own)
                total += (weight * float(targets[row, j]) - float(y[i, j])) ** 2
        assert float(found) == pytest.approx(total / y.numel(), rel=1e-9)


def test_the_forward_prediction_goes_through_the_reference_set():
    """With no more samples than features: their own features predict their own outputs."""
    phi, y, _, _ = parts(n=4, d=6)
    assert float(forward_losses(phi, y, phi, y).max()) < 1e-6


def test_the_score_is_the_mean_of_both_in_standard_deviations():
    phi, y, made, targets = parts()
    wide = (100 * y + 7, 100 * targets + 7)
    mean, std = y.mean(0), y.std(0)
    known, wanted = (y - mean) / std, (targets - mean) / std
    expected = (forward_losses(phi, known, made, wanted) +
                backward_losses(phi, known, made, wanted)) / 2  # fmt: skip
    assert torch.allclose(bidirectional(phi, wide[0], made, wide[1]), expected)
    only = bidirectional(phi, y, made, targets, gamma=1.0)
    assert torch.allclose(only, forward_losses(phi, known, made, wanted))
