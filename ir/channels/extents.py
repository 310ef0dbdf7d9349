"""Extents of every tensor of a program after some classes are removed."""

from __future__ import annotations

from functools import reduce

import numpy as np

from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.classes import Ids
from graphwright.ir.channels.values import Factor, Value
from graphwright.ir.errors import ModelError


class Extents:
    """The kept part of each dimension of each value.

    Attributes:
        removed: flag per class.
    """

    def __init__(self, analysis: Analysis, removed: np.ndarray) -> None:
        self.analysis, self.removed = analysis, removed
        self._known: dict[int, tuple[np.ndarray, ...]] = {}

    def kept_axes(self, f: Factor, node: str) -> tuple[np.ndarray, ...]:
        """A keep flag per position of each dimension of a factor.

        Raises:
            ModelError: what is kept is not a box, so that the smaller view would mean another.
        """
        found = self._known.get(id(f.ids))
        if found is None:
            keep = ~self.removed[self.analysis.class_of[f.ids]]
            axes = range(keep.ndim)
            found = tuple(np.asarray(keep.any(axis=tuple(b for b in axes if b != a))) for a in axes)
            box = reduce(np.multiply.outer, found)
            if not np.array_equal(box, keep):
                raise ModelError("the removed units leave no rectangular tensor", where=node)
            self._known[id(f.ids)] = found
        return found

    def kept(self, value: Value, dim: int, node: str) -> np.ndarray | None:
        """Keep flags of a dimension; None where nothing of it can go."""
        f = value.at(dim)
        return None if f is None else self.kept_axes(f, node)[f.dims.index(dim)]

    def shape(self, value: Value, node: str) -> tuple[int, ...]:
        """The shape that is left."""
        shape = list(value.shape)
        for f in value.factors:
            for d, keep in zip(f.dims, self.kept_axes(f, node), strict=True):
                shape[d] = int(keep.sum())
        return tuple(shape)

    def emptied(self) -> tuple[str, Ids] | None:
        """The first node with a dimension of which nothing is left, and the classes in it."""
        for node, result in self.analysis.values.items():
            for value in result if isinstance(result, list) else [result]:
                if not isinstance(value, Value):
                    continue
                for f in value.factors:
                    if not all(keep.any() for keep in self.kept_axes(f, node)):
                        return node, np.unique(self.analysis.class_of[f.ids])
        return None
