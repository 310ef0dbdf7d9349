"""Linear layers of which some entries of the weight are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_entries(weight: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A weight with other values at some (flat) places."""
    return weight.flatten().index_put((places,), values.to(weight.dtype)).reshape(weight.shape)


class _EntriesLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, places: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, places, values)
        return torch.nn.functional.linear(x, with_entries(weight, places, values), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, places, values = ctx.saved_tensors
        of_x = of_values = of_bias = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            # in bfloat16 the gradient has the precision of the forward pass
            whole = with_entries(weight, places, values).to(gradient.dtype)
            of_x = (gradient @ whole).to(x.dtype)
        if ctx.needs_input_grad[3]:
            whole = rows.t() @ x.flatten(0, -2).to(gradient.dtype)
            of_values = whole.flatten()[places].to(values.dtype)
        if ctx.needs_input_grad[4]:
            of_bias = rows.sum(0)
        return of_x, None, None, of_values, of_bias


def entries_linear(
    x: Tensor, weight: Tensor, places: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """x W^T + b of a weight with `values` at `places`; backward puts them in once more, so that
    no second weight is kept, and has gradients of these entries alone.

    Args:
        x: (..., in).
        weight: (out, in), not trained.
        places: (count,) int64, flat.
        values: (count,), trained.
        bias: (out,) or None.
    """
    result: Tensor = _EntriesLinear.apply(x, weight, places, values, bias)  # type: ignore[no-untyped-call]
    return result
