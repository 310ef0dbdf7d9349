"""Softmax attention and its gradient in time linear in the length, by a Taylor series of exp."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """The output of attention, and the gradients of queries, keys and values."""

    output: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor


def feature_count(width: int, degree: int) -> int:
    """Monomials of `width` variables up to a degree: C(width + degree, degree)."""
    return math.comb(width + degree, degree)


def needed_degree(largest: float, error: float) -> int:
    """The least even degree whose series is right to `error` up to exponents of `largest`.

    The rest of the series is at most s^(g+1) / (g+1)! e^s. Even series of exp are positive
    everywhere, so that no sum of them can vanish.

    Args:
        largest: s, the largest |q k|.
        error: of every entry.
    """
    degree, rest = 0, largest * math.exp(min(largest, 700.0))
    while rest > error:
        degree += 2
        rest *= largest * largest / (degree * (degree + 1))
    return degree


@cache
def _monomials(width: int, degree: int) -> tuple[tuple[int, ...], ...]:
    return tuple(m for t in range(degree + 1)
                 for m in combinations_with_replacement(range(width), t))  # fmt: skip


def features(z: Tensor, degree: int) -> Tensor:
    """f (..., length, C) with f(q) f(k) = sum of (q k)^t / t! for t up to the degree.

    A monomial with exponents m has the factor 1 / sqrt(m!).
    """
    columns = []
    for monomial in _monomials(z.shape[-1], degree):
        counts = [monomial.count(i) for i in set(monomial)]
        column = torch.ones_like(z[..., 0])
        for place in monomial:
            column = column * z[..., place]
        columns.append(column / math.sqrt(math.prod(map(math.factorial, counts))))
    return torch.stack(columns, -1)


def approximate_gradients(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, degree: int, *, causal: bool = False
) -> Gradients:
    """softmax(q k^T) v and its gradients, without a matrix of length by length.

    With P = U1 U2^T of low rank, dS = P * (dO V^T) - diag(rowsum(dO * O)) P is of low rank too: a
    product of low-rank matrices, entry by entry, is a sum over the columns of one of them.

    Args:
        q: (..., length, width), with the scale of attention in it already.
        k: (..., length, width), best with the mean key taken off, which changes no probability.
        v: (..., length, values).
        gradient: dO, (..., length, values).
        degree: of the series, even.
        causal: whether a query sees keys up to its own place only.

    Source: Hu et al. 2024, "Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for
    Transformer Models", theorem 1: the chain of low-rank products; formulas worked out here.
    """
    left, right = features(q, degree), features(k, degree)
    total = _through(left, right, torch.ones_like(v[..., :1]), causal)
    left = left / total
    out = _through(left, right, v, causal)
    rows = (gradient * out).sum(-1, keepdim=True)
    of_values = _back(left, right, gradient, causal)
    of_queries = -rows * _through(left, right, k, causal)
    of_keys = -_back(left, right, rows * q, causal)
    for j in range(v.shape[-1]):
        dj, vj = gradient[..., j : j + 1], v[..., j : j + 1]
        of_queries = of_queries + dj * _through(left, right, vj * k, causal)
        of_keys = of_keys + vj * _back(left, right, dj * q, causal)
    return Gradients(out, of_queries, of_keys, of_values)


def exact_gradients(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, *, causal: bool = False
) -> Gradients:
    """The same by softmax and autograd."""
    parts = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        scores = parts[0] @ parts[1].transpose(-1, -2)
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1) @ parts[2]
        found = torch.autograd.grad(out, parts, gradient)
    return Gradients(out.detach(), *found)


def _through(left: Tensor, right: Tensor, x: Tensor, causal: bool) -> Tensor:
    """(left right^T, below the diagonal where causal) x."""
    if not causal:
        return left @ (right.transpose(-1, -2) @ x)
    sums = (right[..., :, :, None] * x[..., :, None, :]).cumsum(-3)
    return (left[..., None, :] @ sums)[..., 0, :]


def _back(left: Tensor, right: Tensor, x: Tensor, causal: bool) -> Tensor:
    """(left right^T, below the diagonal where causal)^T x."""
    if not causal:
        return right @ (left.transpose(-1, -2) @ x)
    sums = (left[..., :, :, None] * x[..., :, None, :]).flip(-3).cumsum(-3).flip(-3)
    return (right[..., None, :] @ sums)[..., 0, :]
