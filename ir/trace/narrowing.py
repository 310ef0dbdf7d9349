"""From guards to ranges: where a guard may fail, and how far a dimension may go before it does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from graphwright.ir.signature import DimRange
from graphwright.ir.trace.guards import Guard

CLOSE = 1024
"""Sizes nearer to the example than this are all looked at; powers of two beyond."""

FARTHEST = 2**24


def violations(
    guard: Guard, example: Mapping[str, int], ranges: Mapping[str, DimRange]
) -> list[dict[str, int]]:
    """Sizes within `ranges` at which the guard does not hold, a few that differ most.

    The nearest on both sides of the example, the smallest and the largest below four times the
    example's size. Those of a guard on several dimensions are looked for on a coarse grid.
    """
    if len(guard.dims) == 1:
        (dim,) = guard.dims
        failing = [
            {dim: n} for n in sizes_near(example[dim], ranges[dim]) if not guard.holds({dim: n})
        ]
    else:
        grids = [coarse_sizes(example[dim], ranges[dim]) for dim in guard.dims]
        joint = (dict(zip(guard.dims, sizes, strict=True)) for sizes in itertools.product(*grids))
        failing = [sizes for sizes in joint if not guard.holds(sizes)]
    by_distance = sorted(failing, key=lambda sizes: _distance(sizes, example))
    by_size = sorted(failing, key=lambda sizes: math.prod(sizes.values()))
    near = math.prod(4 * example[dim] for dim in guard.dims)
    picks = [
        *by_distance[:1],
        *[s for s in by_distance if all(s[d] >= example[d] for d in s)][:1],
        *by_size[:1],
        *[s for s in by_size if math.prod(s.values()) <= near][-1:],
    ]
    return [s for i, s in enumerate(picks) if s not in picks[:i]]


def narrowed(
    guard: Guard, example: Mapping[str, int], ranges: Mapping[str, DimRange]
) -> dict[str, DimRange]:
    """Ranges around the example within which the guard holds; of its dimensions only.

    All but the first dimension are fixed where it is about several.
    """
    first, *others = guard.dims
    low = high = example[first]
    bounds = ranges[first]

    def holds(size: int) -> bool:
        return guard.holds({**example, first: size})

    while low > bounds.min and low > example[first] - CLOSE and holds(low - 1):
        low -= 1
    if low == example[first] - CLOSE and all(holds(n) for n in sizes_near(low, bounds) if n < low):
        low = bounds.min
    largest: int | None = None
    limit = bounds.max if bounds.max is not None else FARTHEST
    while high < limit and high < example[first] + CLOSE and holds(high + 1):
        high += 1
    if high == limit:
        largest = bounds.max
    elif high == example[first] + CLOSE:
        largest = _far_end(guard, example, first, high, bounds)
    else:
        largest = high
    return {first: DimRange(low, largest)} | {d: DimRange(example[d], example[d]) for d in others}


def _far_end(
    guard: Guard, example: Mapping[str, int], dim: str, known: int, bounds: DimRange
) -> int | None:
    """The largest size up to which it holds at all sizes that are looked at; None for no end."""
    for size in _powers(known, bounds):
        if not guard.holds({**example, dim: size}):
            low, high = known, size
            while high - low > 1:
                middle = (low + high) // 2
                if guard.holds({**example, dim: middle}):
                    low = middle
                else:
                    high = middle
            return low
        known = size
    return bounds.max


def sizes_near(example: int, bounds: DimRange) -> list[int]:
    """Sizes worth looking at: every one near the example, powers of two and neighbours beyond."""
    low = max(bounds.min, 2)
    high = min(bounds.max or FARTHEST, max(4 * example, 64), example + CLOSE)
    close = range(max(low, example - CLOSE), high + 1)
    far_below = [n for n in _around_powers() if low <= n < close.start]
    return [*far_below, *close, *_powers(high, bounds)]


def _powers(above: int, bounds: DimRange) -> Iterator[int]:
    limit = min(bounds.max or FARTHEST, FARTHEST)
    return (n for n in _around_powers() if above < n <= limit)


def _around_powers() -> list[int]:
    return sorted({2**k + change for k in range(1, 25) for change in (-1, 0, 1)})


def coarse_sizes(example: int, bounds: DimRange) -> list[int]:
    """A few sizes of each kind, for guards on several dimensions."""
    wanted = {
        2, 3, 4, 5, 7, 8, 16, 31, 64, 65, example // 2, example - 1, example, example + 1,
        2 * example, 2 * example + 1, 4 * example, 64 * example,
    }  # fmt: skip
    high = bounds.max or FARTHEST
    return sorted(n for n in wanted if max(bounds.min, 2) <= n <= high)


def _distance(sizes: Mapping[str, int], example: Mapping[str, int]) -> float:
    return sum(abs(math.log(n / example[dim])) for dim, n in sizes.items())
