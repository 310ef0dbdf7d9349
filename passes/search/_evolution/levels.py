"""Layers and their levels: what a candidate is, what it costs, and how one becomes another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Levels = tuple[int, ...]
"""A candidate: for every unit the index of its level; a higher one compresses less."""

MOST_SWITCHES = 3
"""Switches of one mutation are the smaller of two draws from 1 to this (P86, the code)."""

MOST_CHANGES = 10
"""Single steps after which a mutation across sizes is given up (P86, the code)."""

LEAST_RETURNED = 0.8
"""Share of what a mutation took that it has to spend again (P86, the code)."""


@dataclass(frozen=True)
class Unit:
    """What gets a level of its own: the layers of one weight, or one branch beside a skip.

    Attributes:
        name: of the first layer, or of the branch.
        layers: names of all layers.
        nodes: names of their calls.
        group: units that may give each other a level, each level costing all of them the same.
        costs: by level, ascending; in weights, or weights times bits.
    """

    name: str
    layers: tuple[str, ...]
    nodes: tuple[str, ...]
    group: str
    costs: tuple[int, ...]


def total(units: Sequence[Unit], levels: Levels) -> int:
    """The cost of a candidate."""
    return sum(unit.costs[level] for unit, level in zip(units, levels, strict=True))


def switched(units: Sequence[Unit], levels: Levels, rng: random.Random) -> Levels:
    """A child with the same cost: some units one level up, as many others of their groups down."""
    child = list(levels)
    for _ in range(min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES))):
        up = [i for i, unit in enumerate(units) if child[i] + 1 < len(unit.costs)]
        down = [i for i in range(len(units)) if child[i] > 0]
        pairs = [i for i in up if any(j != i and units[j].group == units[i].group for j in down)]
        if not pairs:
            break
        first = rng.choice(pairs)
        second = rng.choice(
            [j for j in down if j != first and units[j].group == units[first].group]
        )
        child[first] += 1
        child[second] -= 1
    return tuple(child)


def rebalanced(
    units: Sequence[Unit], levels: Levels, budget: int, rng: random.Random
) -> Levels | None:
    """A child within the budget across sizes: some units one level up, others down until it fits.

    Returns:
        None where that took too many steps, or gave back far more than it took.
    """
    child, added, removed, changes = list(levels), 0, 0, 0
    for _ in range(min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES))):
        up = [i for i, unit in enumerate(units) if child[i] + 1 < len(unit.costs)]
        if not up:
            break
        first = rng.choice(up)
        added += _step(units[first], child, first, 1)
        changes += 1
    raised = {i for i, (old, new) in enumerate(zip(levels, child, strict=True)) if new > old}
    while total(units, tuple(child)) > budget:
        down = [i for i in range(len(units)) if child[i] > 0 and i not in raised]
        if not down or changes >= MOST_CHANGES:
            return None
        removed += _step(units[(second := rng.choice(down))], child, second, -1)
        changes += 1
    if removed and added / removed < LEAST_RETURNED:
        return None
    return tuple(child)


def lowered(units: Sequence[Unit], levels: Levels, budget: int, rng: random.Random) -> Levels:
    """A candidate within the budget: units drawn at random go down a level until it is met."""
    child = list(levels)
    while total(units, tuple(child)) > budget:
        down = [i for i in range(len(units)) if child[i] > 0]
        _step(units[(unit := rng.choice(down))], child, unit, -1)
    return tuple(child)


def _step(unit: Unit, child: list[int], at: int, by: int) -> int:
    before = unit.costs[child[at]]
    child[at] += by
    return abs(unit.costs[child[at]] - before)
