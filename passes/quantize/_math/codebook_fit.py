"""Codebooks of least squares for indices that stay as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from graphwright.ir.stored.codebook import Lookup, Vectors, narrow

CONVERGED = 1e-9
"""Squared size of the gradient, as a share of the first, that counts as zero in float32."""


def fit_codebooks(vectors: Vectors, w: Tensor, h: Tensor, steps: int) -> Vectors:
    """The codebooks with which tr((w' - w) h (w' - w)^T) is least, the indices given.

    The matrix w' is linear in all its codebooks together, so this is a linear least-squares
    problem; solved by preconditioned conjugate gradients from the codebooks that there are. (The
    paper trains them by gradient descent.)

    Args:
        vectors: its codebooks are the start.
        w: (rows, columns) float32.
        h: (columns, columns) float32, positive definite.
        steps: of conjugate gradients, each a product with h.
    """
    problem = _Linear(vectors, h)
    books = problem.start()
    residual = problem.back((w - problem.forward(books) - problem.shift) @ h)
    direction = ready = problem.divide(residual)
    size = first = _dot(residual, ready)
    for _ in range(steps):
        if size <= CONVERGED * first:
            break  # further steps would follow rounding errors
        image = problem.back(problem.forward(direction) @ h)
        curvature = _dot(direction, image)
        if curvature <= 0:
            break
        step = size / curvature
        books = [b + step * d for b, d in zip(books, direction, strict=True)]
        residual = [r - step * i for r, i in zip(residual, image, strict=True)]
        ready = problem.divide(residual)
        after = _dot(residual, ready)
        direction = [r + after / size * d for r, d in zip(ready, direction, strict=True)]
        size = after
    return problem.with_books(books)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


class _Linear:
    """The map from all codebooks to the matrix less its shift, and its transpose."""

    def __init__(self, vectors: Vectors, h: Tensor) -> None:
        self.vectors = vectors
        columns = len(h)
        ones = h.new_ones(columns)
        self.scale = ones if vectors.scale is None else vectors.scale.to(h)
        self.shift = 0 * ones if vectors.shift is None else vectors.shift.to(h)
        order = torch.arange(columns) if vectors.order is None else vectors.order.long()
        self.order = order.to(h.device)
        self.lookups: list[tuple[slice, Lookup, Tensor]] = []
        start = 0
        for lookups in vectors.parts.values():
            end = start + lookups[0].columns
            for lookup in lookups:
                self.lookups.append((slice(start, end), lookup, _places(lookup).to(h.device)))
            start = end
        # Jacobi preconditioner: how often, and in columns of which weight, a vector is used.
        rows = self.lookups[0][1].rows
        uses = self.back((h.diagonal() * self.scale).expand(rows, columns))
        self.diagonal = [torch.where(each > 0, each, torch.ones_like(each)) for each in uses]

    def start(self) -> list[Tensor]:
        """The codebooks that are stored."""
        return [lookup.codebooks.to(self.scale) for _, lookup, _ in self.lookups]

    def forward(self, books: list[Tensor]) -> Tensor:
        """(rows, columns)."""
        rows = self.lookups[0][1].rows
        stored = self.scale.new_zeros(rows, len(self.order))
        for (stretch, lookup, places), book in zip(self.lookups, books, strict=True):
            found = book.reshape(-1, book.shape[-1])[places]
            stored[:, stretch] += found.transpose(1, 2).reshape(-1, lookup.columns)[:rows]
        return stored[:, self.order] * self.scale

    def back(self, matrix: Tensor) -> list[Tensor]:
        """The transpose of `forward`."""
        stored = torch.zeros_like(matrix)
        stored[:, self.order] = matrix * self.scale
        found = []
        for stretch, lookup, places in self.lookups:
            groups, size, width = lookup.codebooks.shape
            part = torch.nn.functional.pad(stored[:, stretch], (0, 0, 0, -len(stored) % width))
            each = part.reshape(-1, width, lookup.columns).transpose(1, 2).reshape(-1, width)
            total = each.new_zeros(groups * size, width).index_add_(0, places.flatten(), each)
            found.append(total.reshape(groups, size, width))
        return found

    def divide(self, books: list[Tensor]) -> list[Tensor]:
        """`books` by the diagonal."""
        return [b / d for b, d in zip(books, self.diagonal, strict=True)]

    def with_books(self, books: list[Tensor]) -> Vectors:
        """The matrix with these codebooks in the place of its own."""
        given = iter(books)
        parts = {
            part: [replace(lookup, codebooks=narrow(next(given)).cpu()) for lookup in lookups]
            for part, lookups in self.vectors.parts.items()
        }
        return replace(self.vectors, parts=parts)


def _places(lookup: Lookup) -> Tensor:
    """(ceil(rows / v), columns): row of the codebooks, put below one another, of every vector."""
    groups, size, _ = lookup.codebooks.shape
    column = torch.arange(lookup.columns)
    return lookup.index().long() + column * groups // lookup.columns * size
