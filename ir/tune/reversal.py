"""Turning a gradient around, where one part of a recipe works against another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around and multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None


def reverse_gradient(x: Tensor, factor: float = 1.0) -> Tensor:
    """x, whose gradient is multiplied by -`factor`.

    Source: Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", eq. 9-10.
    """
    turned: Tensor = _Reversed.apply(x, factor)  # type: ignore[no-untyped-call]
    return turned
