"""The best product of two narrow matrices in the place of a wide one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix (out, columns), or a change of one, as b @ a.

    Attributes:
        b: (out, rank) float32; (experts, out, rank) of a stack of experts.
        a: (rank, columns) float32; (experts, rank, columns).
    """

    b: Tensor
    a: Tensor


def split(matrix: Tensor, basis: Tensor | None, inverse: Tensor | None, rank: int) -> Factors:
    """The best rank-`rank` factors of a matrix, measured in a basis.

    With Q' = Q L^(1/2) for H = Q L Q^T, b a minimizes ||X (matrix - b a)^T|| (P02, equations 4-7:
    the truncated SVD of matrix Q', brought back); without a basis it minimizes ||matrix - b a||.

    Args:
        matrix: (out, columns); for a compensation, original minus compressed.
        basis: Q' (columns, n); None for the identity.
        inverse: its pseudo-inverse (n, columns).
        rank: at most min(out, columns) is used.

    Returns:
        Factors whose singular values are shared evenly by both.
    """
    wide = matrix.double() if basis is None else matrix.double() @ basis
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    return factors_of(u, s, vh, inverse, rank)


def factors_of(u: Tensor, s: Tensor, vh: Tensor, inverse: Tensor | None, rank: int) -> Factors:
    """The factors that `split` makes of a decomposition, so that one serves to choose the rank."""
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    a = root[:, None] * vh[:rank]
    if inverse is not None:
        a = a @ inverse
    return Factors((u[:, :rank] * root).float(), a.float())


def eigenspace(h: Tensor) -> tuple[Tensor, Tensor]:
    """Q L^(1/2) and L^(-1/2) Q^T of H = Q L Q^T, both float64.

    Eigenvalues below float32's resolution of the largest are raised to it: directions that the
    data does not reach then count next to nothing, and dividing by their roots stays harmless.
    """
    values, vectors = torch.linalg.eigh(h.double())
    least = float(values[-1].clamp(min=1e-30)) * torch.finfo(torch.float32).eps
    root = values.clamp(min=least).sqrt()
    return vectors * root, vectors.t() / root[:, None]


def relative_error(change: Tensor, weight: Tensor, h: Tensor | None) -> float:
    """||X change^T|| / ||X weight^T|| from H; of the weights themselves without one."""
    if h is None:
        return float(change.double().norm() / weight.double().norm().clamp_min(1e-30))

    def size(w: Tensor) -> float:
        wide = w.double()
        return float(((wide @ h.double()) * wide).sum().clamp_min(0))

    return float((size(change) / max(size(weight), 1e-30)) ** 0.5)
