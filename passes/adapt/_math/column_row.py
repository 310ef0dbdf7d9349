"""Products of which only some rows are kept: winner-take-all column-row sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError


def split(probabilities: Tensor, budget: int) -> int:
    """How many of the most probable rows are kept for certain.

    The count c below the budget k with the least (1 - P_c) / (k - c), where P_c is the sum of the
    c largest probabilities (P38, theorem 2).

    Args:
        probabilities: (rows,), from the largest to the smallest, of sum 1.
        budget: k.
    """
    sums = torch.cat([probabilities.new_zeros(1), probabilities.cumsum(0)[: budget - 1]])
    left = torch.arange(budget, 0, -1, device=sums.device, dtype=sums.dtype)[: len(sums)]
    return int(((1 - sums).clamp_min(0) / left).argmin())


def choose(weights: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Rows to keep, and the factor of each that makes their sum unbiased.

    Args:
        weights: (rows,), nonnegative: what each row counts.
        budget: rows to keep; all where it is no smaller than their number.

    Returns:
        int64 (budget,), in which a row may come more than once, and factors (budget,).
    """
    count = len(weights)
    if budget >= count:
        return torch.arange(count, device=weights.device), torch.ones_like(weights)
    total = weights.sum()
    even = torch.full_like(weights, 1 / count)
    p = torch.where(total > 0, weights / total.clamp_min(1e-38), even)
    ordered, order = p.sort(descending=True)
    certain = split(ordered, budget)
    rest = ordered[certain:]
    mass = rest.sum()
    if float(mass) <= 0:  # what is left counts nothing
        kept = order[:budget]
        return kept, torch.ones_like(weights[:budget])
    drawn = torch.multinomial(rest, budget - certain, replacement=True)
    factors = mass / (rest[drawn] * (budget - certain))
    places = torch.cat([order[:certain], order[certain:][drawn]])
    return places, torch.cat([torch.ones_like(rest[:1]).expand(certain), factors])


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, share: float, least: int
    ) -> Tensor:
        rows = x.flatten(0, -2)
        budget = max(least, int(share * len(rows)))
        places, factors = choose(rows.detach().float().norm(dim=1), budget)
        ctx.save_for_backward(rows[places] * factors[:, None].to(rows.dtype), places, weight)
        ctx.has_bias = bias is not None
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        kept, places, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = flat[places].t() @ kept
        return of_x, of_weight, flat.sum(0) if ctx.has_bias else None, None, None


def sampled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, share: float, least: int
) -> Tensor:
    """x W^T + b, which keeps only some rows of x for the gradient of W.

    The result and the gradients of x and b are exact; that of W is right in expectation.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        share: of the rows that are kept.
        least: rows that are kept in any case.

    Raises:
        ArgumentError: x has one dimension, and no rows to choose from.
    """
    if x.dim() < 2:
        raise ArgumentError("a single row has none to choose from")
    result: Tensor = _SampledLinear.apply(x, weight, bias, share, least)  # type: ignore[no-untyped-call]
    return result
