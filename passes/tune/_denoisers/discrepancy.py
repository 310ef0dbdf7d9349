"""The maximum mean discrepancy of two sets of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["cubic", "linear", "rbf"]


def mmd2(x: Tensor, y: Tensor, kernel: Kernel = "cubic") -> Tensor:
    """The unbiased estimate of MMD^2, a scalar that may be negative.

    (sum_{i != j} k(x_i, x_j) + sum_{i != j} k(y_i, y_j)) / (m (m - 1)) - 2 / m^2 sum k(x_i, y_j)

    Args:
        x, y: [m, features], as many of both.
        kernel: `cubic` is (u v / features + 1)^3, `linear` is u v, `rbf` is exp(-|u - v|^2 /
            features).

    Source: P16 (Aiello et al. 2023), equation 5; the cubic kernel is that of KID.
    """
    m, k = len(x), KERNELS[kernel]
    within = sum(k(z, z).sum() - k(z, z).diagonal().sum() for z in (x, y))
    return within / (m * (m - 1)) - 2 / m**2 * k(x, y).sum()


def _cubic(u: Tensor, v: Tensor) -> Tensor:
    return (u @ v.T / u.shape[1] + 1) ** 3


def _linear(u: Tensor, v: Tensor) -> Tensor:
    return u @ v.T


def _rbf(u: Tensor, v: Tensor) -> Tensor:
    squares = (u[:, None] - v[None]).square().sum(-1)
    return torch.exp(-squares / u.shape[1])


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cubic": _cubic, "linear": _linear, "rbf": _rbf,
}  # fmt: skip
