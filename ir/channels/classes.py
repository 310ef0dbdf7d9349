"""Index ids, the equalities recorded between them, and their classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
PIN = 0
"""The id of everything that may not be removed."""


@dataclass(frozen=True)
class Pin:
    """Ids that must stay, the node that asks for it, and why."""

    ids: Ids
    node: str
    text: str


class Classes:
    """Hands out ids and merges them; an id that is equal to `PIN` is pinned.

    `find` may be called at any time. Only the pairs recorded since the last call are worked on,
    all at once: components of the graph of their roots.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(1024, np.int64)
        self._count = 1
        self._new: list[tuple[Ids, Ids]] = []
        self._pairs: list[tuple[Ids, Ids]] = []
        self.pins: list[Pin] = []

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Ids:
        """`count` new ids, each a class of its own."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            grown = np.zeros(2 * self._count, np.int64)
            grown[:start] = self._parent[:start]
            self._parent = grown
        ids = np.arange(start, self._count, dtype=np.int64)
        self._parent[start : self._count] = ids
        return ids

    def equal(self, a: Ids, b: Ids, node: str, text: str) -> None:
        """Records `a == b` elementwise (broadcast); equality with `PIN` is a pin of the other."""
        left, right = np.broadcast_arrays(a, b)
        differ = left != right
        left, right = left[differ], right[differ]
        if not left.size:
            return
        pinned = (left == PIN) | (right == PIN)
        if pinned.any():
            self.pin(np.maximum(left, right)[pinned], node, text)
            left, right = left[~pinned], right[~pinned]
        if left.size:
            self._new.append((left, right))
            self._pairs.append((left, right))

    def pin(self, ids: Ids, node: str, text: str) -> None:
        """Pins ids."""
        flat = ids.ravel()
        flat = flat[flat != PIN]
        if flat.size:
            self.pins.append(Pin(flat, node, text))
            self._new.append((flat, np.zeros_like(flat)))

    def find(self, ids: Ids) -> Ids:
        """The class of each id: the smallest id in it, `PIN` for all that is pinned."""
        if self._new:
            left = np.concatenate([a for a, _ in self._new])
            right = np.concatenate([b for _, b in self._new])
            self._new.clear()
            self._merge(self._roots(left), self._roots(right))
        return self._roots(ids)

    def _roots(self, ids: Ids) -> Ids:
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[ids] = roots
                return roots
            roots = above

    def _merge(self, left: Ids, right: Ids) -> None:
        nodes, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        component = _components(len(nodes), places[: len(left)], places[len(left) :])
        smallest = np.full(int(component.max()) + 1, np.iinfo(np.int64).max)
        np.minimum.at(smallest, component, nodes)
        self._parent[nodes] = smallest[component]

    def free_components(self) -> Ids:
        """Component of every id by the equalities alone, so that a pin can be traced back."""
        if not self._pairs:
            return np.arange(self._count, dtype=np.int64)
        left = np.concatenate([a for a, _ in self._pairs])
        right = np.concatenate([b for _, b in self._pairs])
        return _components(self._count, left, right)


def _components(count: int, left: Ids, right: Ids) -> Ids:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    matrix = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    _, labels = connected_components(matrix, directed=False)
    return np.asarray(labels, np.int64)
