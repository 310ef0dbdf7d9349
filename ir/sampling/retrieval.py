"""Nearest neighbours of queries in an index of vectors: the door to the library that searches."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError


class Retriever:
    """Finds the vectors of an index that point most in the direction of a query.

    The search is exact, by scipy's k-d tree of unit vectors, whose distance grows as the cosine
    falls.

    Args:
        vectors: [items, width], finite, of any length but 0.
        neighbours: found per query.

    Raises:
        ArgumentError: no such table, fewer items than neighbours, or a vector without a direction.

    Source: P45, section 3.2; its neighbours are those of the normalized inner product, and what the
    network is given are the vectors as they are.
    """

    def __init__(self, vectors: Tensor, neighbours: int) -> None:
        if vectors.dim() != 2 or not vectors.is_floating_point():
            raise ArgumentError(
                f"an index is a table [items, width] of floats, not {tuple(vectors.shape)} of "
                f"{str(vectors.dtype).removeprefix('torch.')}"
            )
        if len(vectors) < neighbours:
            raise ArgumentError(
                f"the index has {len(vectors)} items, and {neighbours} neighbours are asked for",
                fix="Add items, or ask for fewer neighbours.",
            )
        _refuse(vectors, "item", "of the index")
        self.vectors, self.neighbours = vectors, neighbours

    def __call__(self, queries: Tensor, without: Tensor | None = None) -> Tensor:
        """Numbers of the items nearest to every query, [queries, neighbours] int64, nearest first.

        Args:
            queries: [queries, width].
            without: [queries], an item for each that is not to be found, such as itself.

        Raises:
            ArgumentError: queries of another width or without a direction, or too few items.
        """
        if queries.dim() != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ArgumentError(
                f"queries have the shape {tuple(queries.shape)}, and the index is of vectors of "
                f"{self.vectors.shape[1]}"
            )
        _refuse(queries, "query", "to search for")
        more = self.neighbours if without is None else self.neighbours + 1
        if more > len(self.vectors):
            raise ArgumentError(
                f"the index has {len(self.vectors)} items: none is left for {self.neighbours} "
                "neighbours without the item itself"
            )
        _, found = self._tree.query(_unit(queries).numpy(), k=range(1, more + 1))
        numbers = torch.from_numpy(found.astype("int64"))
        if without is None:
            return numbers
        other = numbers != without[:, None]
        other[other.all(1), -1] = False  # the item was not among them: the last one goes
        return numbers[other].reshape(len(queries), self.neighbours)

    def context(self, queries: Tensor, without: Tensor | None = None) -> Tensor:
        """What the network is given, [queries, neighbours, width]: the vectors as they are."""
        found: Tensor = self.vectors[self(queries, without)]
        return found

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import KDTree

        return KDTree(_unit(self.vectors).numpy())


def _unit(vectors: Tensor) -> Tensor:
    wide = vectors.detach().cpu().double()
    found: Tensor = wide / wide.norm(dim=1, keepdim=True)
    return found


def _refuse(vectors: Tensor, kind: str, what: str) -> None:
    lengths = vectors.double().norm(dim=1)
    wrong = ~(lengths.isfinite() & (lengths > 0))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ArgumentError(
            f"{kind} {place} {what} has the length {float(lengths[place]):g}, and neighbours are "
            "found by direction"
        )
