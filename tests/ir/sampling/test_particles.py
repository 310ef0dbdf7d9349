"""Feynman-Kac correctors against closed-form targets, and the arithmetic of resampling."""

from __future__ import annotations

import pytest
import torch
from models.mixture import Mixture

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.particles import (
    Mixed,
    corrected_step,
    effective_size,
    resampled,
    systematic,
)
from graphwright.ir.sampling.schedule import NoiseSchedule
from graphwright.ir.sampling.solvers.base import Path

VE = NoiseSchedule(kind="edm", sigma_min=0.01, sigma_max=20.0)


def normal(mean: float, variance: float) -> Mixture:
    return Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[mean]], [variance], [1.0])))


def run(
    mixed: Mixed,
    nets: list[Mixture],
    steps: int,
    count: int,
    spread: float = 1.0,
    least: float = 0.5,
) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    path = Path(VE, Grid(spacing="log_snr", final="none").levels(VE, steps))
    x = 20.0 * spread * torch.randn(count, 1, generator=g, dtype=torch.float64)
    logs = torch.zeros(count, dtype=torch.float64)
    for i in range(steps):
        asked = [net.asked("x0")(x, path.levels[i]) for net in nets]
        z = torch.randn(count, 1, generator=g, dtype=torch.float64)
        x, logs = corrected_step(mixed, asked, x, logs, path, i, z)
        if i + 1 < steps and least:
            offsets = torch.rand(1, generator=g, dtype=torch.float64)
            state, logs = resampled({"x": x}, logs, count, offsets, least)
            x = state["x"]
    weights = logs.softmax(0) if least else torch.full_like(logs, 1 / count)
    picked = torch.multinomial(weights, count, replacement=True, generator=g)
    return x[picked, 0]


def energy(a: torch.Tensor, b: torch.Tensor) -> float:
    """The energy distance of two samples on the line."""

    def mean(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u[:, None] - v).abs().mean()

    return float(2 * mean(a, b) - mean(a, a) - mean(b, b))


def test_guided_samples_have_the_target_of_guidance() -> None:
    """p_c^w p_u^(1-w) for N(1.5, 0.25), N(0, 1), w = 2 is N(12/7, 1/7)."""
    nets = [normal(1.5, 0.25), normal(0.0, 1.0)]
    mixed = Mixed((2.0, -1.0))
    exact = 12 / 7 + (1 / 7) ** 0.5 * torch.randn(
        3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    with_weights = run(mixed, nets, 200, 3000)
    without = run(mixed, nets, 200, 3000, least=0.0)
    assert abs(float(with_weights.mean()) - 12 / 7) < 0.05
    assert abs(float(with_weights.var()) - 1 / 7) < 0.03
    assert abs(float(without.mean()) - 12 / 7) > 0.1
    # the distance of two samples of the target itself is below 0.002
    assert energy(with_weights, exact) < 0.006
    assert energy(without, exact) > 5 * energy(with_weights, exact)


def test_annealed_and_product_targets() -> None:
    annealed = run(Mixed((3.0,)), [normal(1.0, 0.9)], 200, 3000, spread=3**-0.5)
    assert abs(float(annealed.var()) - 0.3) < 0.04
    product = run(Mixed((1.0, 1.0)), [normal(1.0, 1.0), normal(0.0, 0.5)], 200, 3000, 2**-0.5)
    assert abs(float(product.mean()) - 1 / 3) < 0.06  # N(1/3, 1/3)
    assert abs(float(product.var()) - 1 / 3) < 0.05


def test_rates_are_the_published_special_cases() -> None:
    g = torch.Generator().manual_seed(0)
    c, u = (torch.randn(5, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    w, g2 = 2.5, 0.7
    square = (c - u).square().flatten(1).sum(1)
    torch.testing.assert_close(Mixed((w, 1 - w)).rate([c, u], g2), 0.5 * g2 * w * (w - 1) * square)
    torch.testing.assert_close(
        Mixed((w,)).rate([c], g2), 0.5 * g2 * w * (w - 1) * c.square().flatten(1).sum(1)
    )
    torch.testing.assert_close(Mixed((1.0, 1.0)).rate([c, u], g2), g2 * (c * u).flatten(1).sum(1))
    for b in ((1.0, 0.0), (0.0, 1.0)):
        assert float(Mixed(b).rate([c, u], g2).abs().max()) < 1e-12


def test_resampling_is_one_permutation_within_groups() -> None:
    logs = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    x = torch.arange(8.0)
    state, left = resampled({"x": x, "history": 10 * x}, logs, 4, torch.tensor([0.5, 0.5]), 0.5)
    assert state["x"].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert torch.equal(state["history"], 10 * state["x"])
    assert left.tolist() == [0.0] * 8
    assert effective_size(logs.reshape(2, 4))[0] == 4.0
    # marks at 0.075, 0.325, 0.575, 0.825 between the ends 0.1, 0.3, 0.6, 1
    picked = systematic(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log(), torch.tensor([0.3]))
    assert picked.tolist() == [[0, 2, 2, 3]]
    with pytest.raises(ArgumentError, match="no groups of 3"):
        resampled({"x": x}, logs, 3, torch.tensor([0.5]), 0.5)
    with pytest.raises(ArgumentError, match="no groups of 1"):
        resampled({"x": x}, logs, 1, torch.rand(8), 0.5)
