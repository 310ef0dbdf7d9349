"""Sizes at which a fresh program is run against its model, cheap ones first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from graphwright.ir.signature import DimRange
from graphwright.ir.trace.derived import Derived
from graphwright.ir.trace.dims import Dynamic

LARGEST = 4.0
"""Largest number of elements of a run's inputs, in multiples of the example's."""

SMALL = 2**16
"""Elements of inputs that are always small enough."""

CHEAP = 1e10
"""Weights times input elements that all runs together may come to, where that is more than four
runs at the example's sizes; an upper bound of multiply-accumulates."""


@dataclass
class Budget:
    """The work that is left for runs, in multiples of a run at the example's sizes.

    Counted, not timed, so that two runs of a spec look at the same sizes.
    """

    inputs: Mapping[str, Tensor]
    dynamic: Dynamic
    example: Mapping[str, int]
    weights: int
    derived: Derived = field(default_factory=Derived)
    left: float = field(init=False)

    def __post_init__(self) -> None:
        run = max(1.0, float(self.weights)) * self._elements({})
        self.left = min(64.0, max(4.0, CHEAP / run))

    def _elements(self, sizes: Mapping[str, int]) -> float:
        total = 0.0
        sizes = self.derived.completed(sizes)
        for name, tensor in self.inputs.items():
            axes = self.dynamic.get(name, {})
            total += math.prod(
                sizes.get(axes[i], n) if i in axes else n for i, n in enumerate(tensor.shape)
            )
        return max(1.0, total)

    def affordable(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """`sizes` if inputs of them are not too large, with the first dimension at 2 if needed."""
        limit = max(SMALL, LARGEST * self._elements({}))
        if self._elements(sizes) <= limit:
            return dict(sizes)
        first = next(iter(self.example), "")
        fewer = {first: 2, **sizes}
        return fewer if self._elements(fewer) <= limit else None

    def spend(self, sizes: Mapping[str, int]) -> bool:
        """Takes a run at `sizes` off the budget; False where too little is left."""
        cost = self._elements(sizes) / self._elements({})
        if cost > self.left:
            return False
        self.left -= cost
        return True


def probes(
    example: Mapping[str, int], ranges: Mapping[str, DimRange]
) -> list[tuple[str, dict[str, int]]]:
    """(dimension, sizes) to try beside the example's: small, odd, even, far, the ends of a range.

    Sizes of a dimension by itself; the example's stay for the others.
    """
    found: list[tuple[str, dict[str, int]]] = []
    for position, (dim, size) in enumerate(example.items()):
        bounds = ranges[dim]
        power = 2 ** math.ceil(math.log2(size + 2))
        wanted = [3, 2, 4, size - 1, bounds.min, size // 2, 2 * size, 2 * size + 1 + 2 * position,
                  power, 4 * size, bounds.max or size]  # fmt: skip
        sizes = dict.fromkeys(n for n in wanted if _within(n, bounds) and n not in (1, size))
        found += [(dim, {dim: n}) for n in sizes]
    return sorted(found, key=lambda item: item[1][item[0]] / example[item[0]])


def _within(size: int, bounds: DimRange) -> bool:
    return size >= max(1, bounds.min) and (bounds.max is None or size <= bounds.max)
