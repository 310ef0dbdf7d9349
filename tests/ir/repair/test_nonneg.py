"""Non-negative least squares: many sides at once, against an active set for each."""

from __future__ import annotations

import torch

from graphwright.ir.repair.nonneg import EXACT, _exact, _projected, solve_nonneg


def problem(n: int, sides: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated filters of unequal sizes, as a layer has them, and a small ridge."""
    g = torch.Generator().manual_seed(n)
    y = torch.randn(n, 3 * n, generator=g, dtype=torch.float64)
    y = y + torch.randn(3 * n, generator=g, dtype=torch.float64)
    y = y * torch.logspace(0, spread, n, dtype=torch.float64)[:, None]
    x = torch.randn(sides, 3 * n, generator=g, dtype=torch.float64)
    left = y @ y.T
    return left + 0.01 * left.diagonal().mean() * torch.eye(n).double(), y @ x.T


def test_the_two_ways_agree() -> None:
    for spread in (0.0, 1.0):
        left, right = problem(120, 15, spread)
        exact, fast = _exact(left, right), _projected(left, right)
        assert float(fast.min()) >= 0
        gap = (fast - exact).norm() / exact.norm()
        assert float(gap) < 1e-2  # it ends after a hundred steps, or at 1e-5 a step

        def objective(s: torch.Tensor, a: torch.Tensor = left, b: torch.Tensor = right) -> float:
            return float(((a @ s) * s).sum() / 2 - (b * s).sum())

        assert objective(fast) <= objective(exact) + 1e-4 * abs(objective(exact))


def test_beyond_the_limit_it_is_the_fast_one() -> None:
    left, right = problem(EXACT + 10, 6, 0.5)
    assert torch.equal(solve_nonneg(left, right), _projected(left, right))
    small = left[:EXACT, :EXACT], right[:EXACT]
    assert torch.equal(solve_nonneg(*small), _exact(*small))
