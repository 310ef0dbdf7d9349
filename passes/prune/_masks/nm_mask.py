"""N:M masks: of every M consecutive entries of a row, the N largest stay."""

from __future__ import annotations

import torch
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask of the entries that stay when every group of `m` along the last dimension keeps its
    `n` largest.

    Args:
        scores: any floating shape (..., k); NaN counts as largest.
        n: entries that a group keeps, at least 0.
        m: size of a group; it divides k.

    Returns:
        A boolean tensor of the same shape with exactly `n` of every `m` entries true; of equal
        scores the first ones stay.

    Raises:
        ValueError: the last dimension does not divide into groups of `m`.
    """
    if scores.shape[-1] % m:  # a reshape would pair entries of different rows without a word
        raise ValueError(f"rows of {scores.shape[-1]} do not divide into groups of {m}")
    groups = scores.detach().reshape(-1, m)
    ranked = torch.sort(groups, dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, ranked[:, :n], True)
    return mask.reshape(scores.shape)
