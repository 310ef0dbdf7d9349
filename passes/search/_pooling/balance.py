"""Which of several sets of weights judges which network: a mixture whose parts are used evenly."""

from __future__ import annotations

import torch
from torch import Tensor

EVEN = 1e-4
"""Largest divergence of the parts' use from the uniform one (P13, the code)."""

MOST_ROUNDS = 10000
"""Rounds of balancing at most."""


def mixture(scores: Tensor, temperature: float) -> Tensor:
    """P(model | path), (paths, models), before it is balanced: softmax(temperature * scores)."""
    return torch.softmax(temperature * scores.double(), -1)


def balanced(parts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mixture with every model used equally often over all paths.

    Divides by the models' mean use, and makes rows sum to 1 again, until the use is uniform.

    Returns:
        The mixture, and the uses that it was divided by, for `divided`.
    """
    used = []
    for _ in range(MOST_ROUNDS):
        use = parts.mean(0)
        if float((use * (use * len(use)).log()).sum().abs()) <= EVEN:
            break
        used.append(use)
        parts = divided(parts, [use])
    return parts, used


def divided(parts: Tensor, uses: list[Tensor]) -> Tensor:
    """The mixture that the divisors of an epoch make of the scores as they are now."""
    for use in uses:
        parts = parts / use
        parts = parts / parts.sum(-1, keepdim=True)
    return parts
