"""Finds the smallest weights of a layer: exactly, in groups, or by a threshold of a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 0.995
"""Largest share of a layer that is pruned."""


def count_of(share: float, size: int) -> int:
    """The number of weights that a share of `size` is: rounded up, and `MOST` of them at most."""
    return min(math.ceil(share * size), int(MOST * size))


def smallest(weight: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` entries with the smallest |w|; of equal ones the first."""
    flat = weight.detach().abs().flatten()
    if count == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    threshold = torch.kthvalue(flat, count).values
    below, equal = flat < threshold, flat == threshold
    missing = count - below.sum()
    return (below | (equal & (equal.cumsum(0) <= missing))).reshape(weight.shape)


def below_sampled(weight: Tensor, share: float, places: Tensor) -> Tensor:
    """Boolean mask of the entries below a threshold that a sample of the layer gives.

    Args:
        weight: any shape.
        share: of the sample that is below the threshold.
        places: positions of the sample in the flattened weight.
    """
    magnitude = weight.detach().abs()
    sample = magnitude.flatten()[places]
    count = count_of(share, sample.numel())
    return magnitude < torch.kthvalue(sample, count + 1).values
