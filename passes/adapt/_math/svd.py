"""The largest singular triplets of a matrix, exactly or by random projections."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Directions beyond the rank that a random projection keeps (Halko et al. 2011, section 4.2)."""


def truncated_svd(
    matrix: Tensor, rank: int, iterations: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets (u, s, vh) of a matrix, in float64.

    Args:
        matrix: (out, columns).
        rank: at most min(out, columns).
        iterations: of the subspace iteration (Halko et al. 2011, algorithm 4.4); None for the
            exact decomposition.
        generator: of the random projection.
    """
    wide = matrix.double()
    if iterations is None or rank + OVERSAMPLING >= min(wide.shape):
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    shape = (wide.shape[1], rank + OVERSAMPLING)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(wide @ drawn).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(wide.t() @ basis).Q
        basis = torch.linalg.qr(wide @ basis).Q
    u, s, vh = torch.linalg.svd(basis.t() @ wide, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]
