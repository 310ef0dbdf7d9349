"""Selects units: the lowest scores first, until a target is met, within limits per group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.extents import Extents


@dataclass
class Selection:
    """Units of the eligible groups with their scores, and the limits.

    Attributes:
        groups: eligible groups.
        scores: per group, a score per unit.
        divisible: the number of units a group keeps is a multiple of this; smaller groups stay.
        least: per group, the least number of units it keeps.
        by_group: take the same share of every group rather than the lowest scores of all.
    """

    analysis: Analysis
    groups: Sequence[ChannelGroup]
    scores: Sequence[np.ndarray]
    divisible: int
    least: Sequence[int]
    by_group: bool

    def __post_init__(self) -> None:
        self.ranked = np.sort(np.concatenate(self.scores))
        self._sorted = [np.sort(scores) for scores in self.scores]
        self._order = [np.argsort(scores, kind="stable") for scores in self.scores]

    def steps(self) -> int:
        """Number of ever larger removals there are."""
        return max(g.units for g in self.groups) if self.by_group else len(self.ranked)

    def removed_at(self, step: int) -> list[np.ndarray]:
        """Unit indices per group at a step; a larger step never removes fewer."""
        found = []
        parts = zip(self.groups, self._sorted, self._order, self.least, strict=True)
        for group, scores, order, least in parts:
            if self.by_group:
                count = group.units * step // self.steps()
            elif step == 0:
                count = 0
            else:
                count = int(np.searchsorted(scores, self.ranked[step - 1], "right"))
            found.append(order[: self._limited(group.units, count, least)])
        return found

    def _limited(self, units: int, count: int, least: int) -> int:
        kept = max(units - count, least, 1)
        kept = -(-kept // self.divisible) * self.divisible
        return max(0, units - kept)

    def flags(self, units: Sequence[np.ndarray]) -> np.ndarray:
        """Removal flag per class."""
        removed = np.zeros(self.analysis.count, bool)
        for group, chosen in zip(self.groups, units, strict=True):
            removed[group.classes[chosen]] = True
        return removed

    def choose(self, measure: Callable[[np.ndarray], float], target: float) -> list[np.ndarray]:
        """The removal whose measured share is nearest to `target`.

        Args:
            measure: share that is gone, from removal flags.
            target: wanted share.
        """
        while True:
            low, high = 0, self.steps()
            while low < high:  # first step that reaches the target
                middle = (low + high) // 2
                if measure(self.flags(self.removed_at(middle))) >= target - 1e-12:
                    high = middle
                else:
                    low = middle + 1
            near = [self.removed_at(step) for step in (low, max(0, low - 1))]
            best = min(near, key=lambda units: abs(measure(self.flags(units)) - target))
            empty = Extents(self.analysis, self.flags(best)).emptied()
            if empty is None:
                return best
            self._protect(empty[1])

    def _protect(self, classes: np.ndarray) -> None:
        """Keeps the highest-scored unit of a dimension that would be empty."""
        every = np.concatenate([g.classes for g in self.groups])
        values = np.concatenate(self.scores)
        inside = np.flatnonzero(np.isin(every, classes))
        kept = every[inside[np.argmax(values[inside])]]
        self._order = [
            order[group.classes[order] != kept]
            for group, order in zip(self.groups, self._order, strict=True)
        ]
