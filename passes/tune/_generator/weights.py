"""Losses of weights: bound to what they were, or pushed away from others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from graphwright.ir.tune.hooks import Values

Repulsion = Literal["exponential", "l2", "reciprocal"]

HEIGHT = 100.0
"""Of the exponential repulsion where there is no distance."""

LEAST = 1e-12
"""Distance below which the reciprocal does not go on rising."""


def fisher_diagonal(logits: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over samples of the squared gradients of their logits.

    Args:
        logits: [samples], with a graph behind them.
        parameters: by name.
    """
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    values = list(parameters.values())
    for index, logit in enumerate(logits):
        more = index < len(logits) - 1
        found = torch.autograd.grad(logit, values, retain_graph=more, materialize_grads=True)
        for name, gradient in zip(total, found, strict=True):
            total[name] += gradient.square() / len(logits)
    return total


def elastic(values: Values, start: Values, fisher: Values) -> Tensor:
    """Half the sum of F (w - w0)^2 over all weights.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting", equation 3, without its
    factor.
    """
    parts = [(f * (values[n] - start[n]).square()).sum() for n, f in fisher.items()]
    return torch.stack(parts).sum() / 2


def weight_distance(values: Values, others: Sequence[Values]) -> Tensor:
    """Half the mean, over tensors and other models, of the mean squared difference of weights.

    Args:
        values: by name.
        others: of each model, the tensors that are compared.
    """
    parts = [_apart(values, other.items()) for other in others]
    return torch.stack(parts).mean() / 2


def _apart(values: Values, others: Iterable[tuple[str, Tensor]]) -> Tensor:
    return torch.stack([(values[name] - other).square().mean() for name, other in others]).mean()


def repelled(kind: Repulsion, distance: Tensor, gamma: float) -> Tensor:
    """A loss that falls with the distance d.

    `exponential`: 100 exp(-gamma d), at most 100; `l2`: -gamma d, without a bound below;
    `reciprocal`: gamma / d, as steep as it gets near nothing.
    """
    if kind == "exponential":
        return HEIGHT * (-gamma * distance).exp()
    if kind == "l2":
        return -gamma * distance
    return gamma / distance.clamp(min=LEAST)
