"""The affine subspace that a few embeddings span, and the way to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-6
"""Singular values below this share of the largest span nothing."""


@dataclass(frozen=True)
class Subspace:
    """mean + span(basis).

    Attributes:
        mean: (numbers,).
        basis: (numbers, rank), orthonormal columns.
    """

    mean: Tensor
    basis: Tensor

    def residual(self, x: Tensor) -> Tensor:
        """x minus its projection: perpendicular to the subspace, and zero on it.

        Args:
            x: (batch, numbers).
        """
        mean, basis = self.mean.to(x), self.basis.to(x)
        centred = x - mean
        return centred - (centred @ basis) @ basis.mT


def spanned(rows: Tensor) -> Subspace:
    """The smallest affine subspace through all rows.

    Args:
        rows: (count, numbers); the rank is count - 1 at most.
    """
    rows = rows.double()
    mean = rows.mean(0)
    _, values, turned = torch.linalg.svd(rows - mean, full_matrices=False)
    rank = int((values > LEAST * values.max().clamp_min(1e-30)).sum())
    return Subspace(mean, turned[:rank].mT.contiguous())
