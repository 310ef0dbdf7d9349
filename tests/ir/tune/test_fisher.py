"""The inverse empirical Fisher against the dense inverse, and against the paper's own recursion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import fisher
from graphwright.ir.tune.fisher import Fisher, Window

D, M, DAMP = 200, 16, 1e-5


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pages for every vector here, the last one short."""
    monkeypatch.setattr(fisher, "PAGE", 90 * M)


def drawn(count: int = M, size: int = D, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 0, size, dtype=torch.float64)
    return torch.randn(count, size, generator=g, dtype=torch.float64) * scale


def dense(gradients: Tensor, block: int | None = None) -> Tensor:
    m, d = gradients.shape
    full = DAMP * torch.eye(d, dtype=torch.float64) + gradients.T @ gradients / m
    if block is not None:
        number = torch.arange(d) // block
        full[number[:, None] != number[None]] = 0.0
    return torch.linalg.inv(full)


@pytest.mark.parametrize("block", [None, 48, 64, 1, 500])
def test_product_diagonal_and_entries_are_those_of_the_dense_inverse(block: int | None) -> None:
    gradients, inverse = drawn(), dense(drawn(), block)
    mine = Fisher(gradients, DAMP, block)
    x = torch.randn(D, dtype=torch.float64)
    size = float((inverse @ x).abs().max())
    torch.testing.assert_close(mine.product(x), inverse @ x, rtol=1e-9, atol=1e-11 * size)
    torch.testing.assert_close(mine.diagonal(), inverse.diagonal(), rtol=1e-9, atol=0.0)
    k, l = torch.randint(0, D, (2, 7, 9))  # noqa: E741
    torch.testing.assert_close(mine.entries(k, l), inverse[k, l], rtol=1e-9, atol=1e-6)
    assert torch.equal(gradients, drawn())


def test_vectors_and_denominators_follow_the_papers_recursion() -> None:
    g = drawn()
    v, den = torch.zeros_like(g), torch.zeros(M, dtype=torch.float64)
    for i in range(M):
        v[i] = g[i] / DAMP
        for j in range(i):
            v[i] -= (v[j] @ g[i]) / den[j] * v[j]
        den[i] = M + g[i] @ v[i]
    pages = list(Fisher(g, DAMP).vectors())
    assert len(pages) == 3
    found = torch.cat([page[0] for _, page, _ in pages], 1)
    torch.testing.assert_close(pages[0][2][0], den, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found, v, rtol=1e-8, atol=1e-8 * float(v.abs().max()))


@pytest.mark.parametrize("block", [None, 40])
def test_diagonal_blocks(block: int | None) -> None:
    inverse = dense(drawn(), block)
    found = Fisher(drawn(), DAMP, block).diagonal_blocks(4)
    expected = torch.stack([inverse[i : i + 4, i : i + 4] for i in range(0, D, 4)])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-6)


def test_zero_gradients_leave_the_damped_identity() -> None:
    mine = Fisher(torch.zeros(4, 10), 0.5, 4)
    torch.testing.assert_close(mine.diagonal(), torch.full((10,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(mine.product(torch.ones(10)), torch.full((10,), 2.0).double())


def test_one_weight_is_removed_optimally() -> None:
    """On a quadratic with Hessian F: no other choice of the rest, with w_k = 0, is lower."""
    mine, inverse = Fisher(drawn(), DAMP), dense(drawn())
    hessian, w, k = torch.linalg.inv(inverse), torch.randn(D, dtype=torch.float64), 150
    u = torch.zeros(D, dtype=torch.float64)
    u[k] = -w[k] / mine.diagonal()[k]
    change = mine.product(u)
    assert float(w[k] + change[k]) == pytest.approx(0.0, abs=1e-9)
    increase = float(change @ hessian @ change) / 2
    assert increase == pytest.approx(float(w[k] ** 2 / (2 * inverse[k, k])), rel=1e-6)
    rest = torch.arange(D) != k
    best = torch.linalg.solve(hessian[rest][:, rest], hessian[rest][:, k] * w[k])
    torch.testing.assert_close(change[rest], best, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("added", [5, 16, 16 + 9, 40])
def test_window_before_and_after_it_wraps_around(added: int) -> None:
    window = Window(D, M, DAMP, torch.float64)
    gradients = drawn(added)
    for gradient in gradients:
        window.add(gradient)
    held = torch.zeros(M, D, dtype=torch.float64)
    last = gradients[-M:]
    held[: len(last)] = last
    expected = dense(held) @ torch.ones(D, dtype=torch.float64)
    found = window.product(torch.ones(D, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="NaN"):
        Fisher(torch.full((2, 3), float("nan")))
    with pytest.raises(ArgumentError, match="NaN"):
        Fisher(torch.full((2, 3), float("inf")), block=2).diagonal()
    with pytest.raises(ArgumentError, match="0 gradients"):
        Fisher(torch.zeros(0, 3))
    with pytest.raises(ArgumentError, match="do not divide"):
        Fisher(torch.ones(2, 12), block=6).diagonal_blocks(4)
