"""The selective scan: every form of it is the recurrence, step by step, in float64."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.ops.selective_scan import chunked, recurrence, selective_scan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    batch: int, length: int, width: int, states: int, dtype: torch.dtype = torch.float64
) -> Inputs:
    g = torch.Generator().manual_seed(length)
    x, spread = torch.randn((2, batch, length, width), generator=g, dtype=dtype)
    b, c = torch.randn((2, batch, length, states), generator=g, dtype=dtype)
    a = -3 * torch.rand((width, states), generator=g, dtype=dtype)
    return x, F.softplus(spread), a, b, c


def by_hand(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The published equations, element by element."""
    y = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for d in range(x.shape[2]):
            h = torch.zeros(a.shape[1], dtype=x.dtype)
            for t in range(x.shape[1]):
                h = torch.exp(delta[i, t, d] * a[d]) * h + delta[i, t, d] * b[i, t] * x[i, t, d]
                y[i, t, d] = (c[i, t] * h).sum()
    return y


def test_the_recurrence_is_the_published_one() -> None:
    given = inputs(2, 7, 3, 4)
    torch.testing.assert_close(recurrence(*given), by_hand(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("chunk", [None, 1, 3, 64])
def test_chunks_of_any_size_give_the_recurrence(length: int, chunk: int | None) -> None:
    given = inputs(2, length, 5, 3)
    torch.testing.assert_close(chunked(*given, chunk), recurrence(*given), rtol=1e-11, atol=1e-12)


def test_no_steps_are_no_results() -> None:
    assert selective_scan(*inputs(2, 0, 5, 3)).shape == (2, 0, 5)


def test_the_last_state_is_right_too() -> None:
    """c picks one state at the last step alone."""
    x, delta, a, b, _ = inputs(1, 10, 2, 3)
    wanted = torch.zeros(2, 3, dtype=x.dtype)
    for t in range(10):
        wanted = torch.exp(delta[0, t][:, None] * a) * wanted
        wanted += (delta[0, t] * x[0, t])[:, None] * b[0, t][None]
    for n in range(3):
        c = torch.zeros(1, 10, 3, dtype=x.dtype)
        c[0, -1, n] = 1
        found = selective_scan(x, delta, a, b, c)[0, -1]
        torch.testing.assert_close(found, wanted[:, n], rtol=1e-11, atol=1e-12)


def test_decays_that_vanish_overflow_nothing() -> None:
    x, delta, a, b, c = inputs(1, 40, 4, 3, torch.float32)
    found = selective_scan(x, delta * 100, a - 200, b, c)
    assert found.isfinite().all()
    wanted = recurrence(*(t.double() for t in (x, delta * 100, a - 200, b, c)))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_step_changes_nothing_before_it() -> None:
    x, *rest = inputs(1, 20, 4, 3)
    moved = x.clone()
    moved[:, 11] += 1
    change = (selective_scan(moved, *rest) - selective_scan(x, *rest)).abs().amax((0, 2))
    assert (change[:11] == 0).all()
    assert (change[11:] > 0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    given = tuple(t.requires_grad_() for t in inputs(2, 5, 2, 3))
    assert torch.autograd.gradcheck(selective_scan, given)


class TwoScans(nn.Module):
    """Two scans after each other, the second one backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(-torch.rand(6, 4) - 0.1)
        self.into = nn.Linear(6, 14)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            delta, b, c = self.into(x).split([6, 4, 4], dim=-1)
            x = x + selective_scan(x, F.softplus(delta), self.a, b, c).flip(1)
        return x


def test_onnx_has_one_scan_each_and_is_right_at_free_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoScans().eval()
    program = gw.trace(model, (torch.randn(2, 9, 6),), {"x": {0: "batch", 1: "length"}})
    compiled = gw.lower(program, "onnxruntime")
    for shape in ((1, 1, 6), (3, 150, 6)):
        x = torch.randn(shape)
        wanted = model.double()(x.double()).float().detach()
        model.float()
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)
    compiled.save(tmp_path)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Scan") == 2
    assert kinds.count("Exp") == 0  # inside the scan alone, never for all steps at once
