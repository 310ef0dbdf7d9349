"""M-FAC as an optimizer: its steps by formula, its state, and what it is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.fisher import Window
from graphwright.ir.tune.mfac import MfacOptimizer


def problem() -> tuple[Tensor, Tensor]:
    """Noisy least squares, condition number 1e4, the same share of the loss in every direction."""
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2, 20).double()
    x = torch.randn(256, 20, generator=g, dtype=torch.float64) * spread
    best = torch.randn(20, generator=g, dtype=torch.float64) / spread
    return x, x @ best + torch.randn(256, generator=g, dtype=torch.float64)


def run(make: Any, steps: int) -> float:
    """Share of the loss above the least that is left after training on batches of 16."""
    x, y = problem()
    least = float((x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0] - y).square().mean())
    w = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer, start = make([w]), float(y.square().mean())
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randperm(256, generator=g)[:16]
        optimizer.zero_grad()
        (x[rows] @ w - y[rows]).square().mean().backward()
        optimizer.step()
    return (float((x @ w.detach() - y).square().mean()) - least) / (start - least)


def test_beats_sgd_at_its_best_rate_on_an_ill_conditioned_problem() -> None:
    sgd = min(
        run(lambda p, lr=lr, mu=mu: torch.optim.SGD(p, lr, mu), 300)
        for lr in (0.01, 0.03, 0.1, 0.3)
        for mu in (0.0, 0.9)
    )
    assert run(lambda p: MfacOptimizer(p, 0.1, gradients=256), 150) < 0.5 * sgd
    assert run(lambda p: MfacOptimizer(p, 0.1, gradients=256), 300) < 0.1 * sgd


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_follow_the_dense_formula(momentum: float) -> None:
    """Two tensors, weight decay, more steps than the window is long."""
    lr, decay, damp, m = 0.1, 0.01, 1e-2, 3
    params = [nn.Parameter(torch.randn(2, 3).double()), nn.Parameter(torch.randn(4).double())]
    w = torch.cat([p.detach().flatten() for p in params])
    optimizer = MfacOptimizer(params, lr, momentum, decay, gradients=m, damp=damp)
    window, average = torch.zeros(m, 10).double(), torch.zeros(10).double()
    for step in range(7):
        raw = torch.randn(10).double()
        params[0].grad, params[1].grad = raw[:6].view(2, 3), raw[6:]
        window[step % m] = raw + decay * w
        fisher = damp * torch.eye(10).double() + window.T @ window / m
        direction = torch.linalg.solve(fisher, window[step % m])
        average = momentum * average + (1 - momentum) * direction
        w = w - lr * average
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), w)


def test_a_window_in_float32_is_as_exact_as_its_gradients() -> None:
    """Large gradients and little damping, where the two terms of the inverse nearly cancel."""
    g = torch.Generator().manual_seed(3)
    window = Window(400, 8, 1e-5)
    rows = 30 * torch.randn(8, 400, generator=g)
    for row in rows:
        window.add(row)
    fisher = 1e-5 * torch.eye(400).double() + rows.double().T @ rows.double() / 8
    for x in (rows[2], torch.randn(400, generator=g)):
        expected = torch.linalg.solve(fisher, x.double())
        gap = (window.product(x).double() - expected).norm() / expected.norm()
        assert float(gap) < 1e-6  # one rounding to float32


def test_a_window_beyond_its_bound_is_refused_before_it_is_made() -> None:
    w = nn.Parameter(torch.zeros(3_000_000, device="meta"))
    with pytest.raises(ArgumentError, match=r"takes 11\.4 GiB") as caught:
        MfacOptimizer([w])
    assert "Lower fisher_gradients to 715" in str(caught.value.fix)


def test_zeros_stay_zero_when_asked() -> None:
    w = nn.Parameter(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    optimizer = MfacOptimizer([w], 0.1, gradients=4, sparse=True)
    for _ in range(3):
        w.grad = torch.randn(4)
        optimizer.step()
    assert w[1] == w[3] == 0.0
    assert optimizer.window.gradients.shape == (4, 2)


def test_goes_on_from_its_saved_state_with_the_same_bytes() -> None:
    def steps(optimizer: MfacOptimizer, w: nn.Parameter, first: int, last: int) -> None:
        for step in range(first, last):
            w.grad = torch.randn(6, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    straight, halves = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    steps(MfacOptimizer([straight], momentum=0.5, gradients=4), straight, 0, 9)
    first = MfacOptimizer([halves], momentum=0.5, gradients=4)
    steps(first, halves, 0, 5)
    second = MfacOptimizer([halves], momentum=0.5, gradients=4)
    second.load_state_dict(first.state_dict())
    steps(second, halves, 5, 9)
    assert torch.equal(straight, halves)
    with pytest.raises(ArgumentError, match="window"):
        MfacOptimizer([halves], gradients=5).load_state_dict(first.state_dict())


def test_trains_a_program_by_its_option() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    x = torch.randn(64, 8)
    data = [(x[i : i + 16], (x[i : i + 16, :3]).argmax(1)) for i in range(0, 64, 16)]
    program = gw.trace(model, (x[:4],), {"input": {0: "batch"}})
    options = TuneOptions(optimizer="mfac", lr=3e-3, epochs=15, fisher_gradients=32,
                          fisher_damp=1e-3, schedule="constant")  # fmt: skip
    losses = tune(program, data, options, Context()).history.losses
    assert losses[-1] < 0.5 * losses[0]


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="damp > 0"):
        MfacOptimizer([nn.Parameter(torch.ones(2))], damp=0.0)
