from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from graphwright.ir.tune.checkpoint import Checkpoint
from graphwright.passes.quantize._math.allocate import allocate
from graphwright.passes.search._evolution.evolve import Evolution, Fitness, Stage
from graphwright.passes.search._evolution.levels import (
    Levels,
    Unit,
    lowered,
    rebalanced,
    switched,
    total,
)

Table = np.ndarray


def units(sizes: Sequence[int], levels: int, *, by_size: bool = True) -> list[Unit]:
    return [Unit(str(i), (str(i),), (str(i),), str(size) if by_size else "",
                 tuple(size * (level + 1) for level in range(levels)))
            for i, size in enumerate(sizes)]  # fmt: skip


def evolution(
    start: Levels, mutate: object, fitness: Fitness, offspring: int = 16, seed: int = 0,
    stages: Sequence[Stage] = (Stage(1, 1),),
) -> Evolution:  # fmt: skip
    return Evolution(start, mutate, fitness, stages, offspring,  # type: ignore[arg-type]
                     lambda generation: 1000 * seed + generation)  # fmt: skip


def of_table(values: Table) -> Fitness:
    """Sums of a unit's value at its level."""
    rows = np.arange(len(values))
    return lambda candidates, tokens, where: [
        float(values[rows, list(c)].sum()) for c in candidates
    ]


def test_a_switch_keeps_the_cost_of_every_group() -> None:
    made = units([3, 3, 3, 5, 5, 7], 4)
    rng = random.Random(0)
    levels: Levels = (1, 2, 3, 0, 2, 1)
    seen = set()
    for _ in range(300):
        child = switched(made, levels, rng)
        for size in (3, 5, 7):
            costs = [sum(u.costs[x] for u, x in zip(made, candidate, strict=True)
                         if u.group == str(size)) for candidate in (levels, child)]  # fmt: skip
            assert costs[0] == costs[1]
        assert child[5] == levels[5]  # it has nobody to give to or to take from
        assert sum(abs(a - b) for a, b in zip(levels, child, strict=True)) <= 6
        levels = child
        seen.add(child)
    assert len(seen) == 10 * 3  # all levels with these sums


def test_across_sizes_a_child_keeps_within_the_budget() -> None:
    made = units([8, 9, 10, 10, 11, 12, 30, 70], 4, by_size=False)
    rng = random.Random(1)
    levels: Levels = (2, 1, 2, 1, 1, 2, 1, 1)
    budget = total(made, levels)
    found = [rebalanced(made, levels, budget, rng) for _ in range(400)]
    children = [child for child in found if child is not None]
    assert len(children) < len(found)  # some were given up
    assert len(set(children)) > 30
    for child in children:
        assert total(made, child) <= budget
        pairs = list(zip(made, levels, child, strict=True))
        added = sum(u.costs[b] - u.costs[a] for u, a, b in pairs if b > a)
        removed = sum(u.costs[a] - u.costs[b] for u, a, b in pairs if b < a)
        assert removed == 0 or added >= 0.8 * removed
    assert total(made, lowered(made, (3,) * 8, budget, rng)) <= budget


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_of_a_sum_in_the_paper_s_number_of_generations(seed: int) -> None:
    n, k = 16, 6
    cost = np.random.default_rng(seed).exponential(size=n)
    made = [Unit(str(i), (str(i),), (str(i),), "", (0, 1)) for i in range(n)]
    values = np.stack([cost, np.zeros(n)], 1)
    start = tuple([0] * k + [1] * (n - k))
    search = evolution(start, lambda x, rng: switched(made, x, rng), of_table(values), 32, seed)
    for _ in range(round(k * (n - k) / 1.5)):
        search.step()
    assert {i for i, level in enumerate(search.parent) if level == 0} == set(np.argsort(cost)[:k])
    assert search.history == sorted(search.history, reverse=True)


def test_it_finds_what_a_sum_of_single_errors_cannot() -> None:
    # Two layers that hurt little alone and much together: what the paper calls not monotone.
    rng = np.random.default_rng(3)
    n = 8
    alone = rng.uniform(0.5, 1.0, n)
    alone[[2, 5]] = 0.1

    def fitness(candidates: Sequence[Levels], tokens: int, where: object) -> list[float]:
        gone = [1 - np.array(c) for c in candidates]
        return [float(g @ alone + 5 * g[2] * g[5]) for g in gone]

    made = [Unit(str(i), (str(i),), (str(i),), "", (0, 1)) for i in range(n)]
    singles = np.stack([alone, np.zeros(n)], 1)
    separable = tuple(int(x) for x in allocate(singles, np.tile([0.0, 1.0], (n, 1)), n - 3))
    choices = [c for c in itertools.product((0, 1), repeat=n) if sum(c) == n - 3]
    best = min(fitness(choices, 1, None))
    search = evolution((0, 0, 0, 1, 1, 1, 1, 1), lambda x, rng: switched(made, x, rng), fitness)
    for _ in range(20):
        search.step()
    assert fitness([search.parent], 1, None)[0] == pytest.approx(best)
    assert fitness([separable], 1, None)[0] > 2 * best


def test_selection_goes_by_stages_and_the_parent_joins_the_last() -> None:
    made = units([1] * 6, 3)
    seen: list[tuple[int, int, bool]] = []

    def fitness(candidates: Sequence[Levels], tokens: int, where: tuple[int, int]) -> list[float]:
        seen.append((len(candidates), tokens, search.parent in candidates))
        return [0.0 if c == search.parent else 1.0 for c in candidates]

    stages = [Stage(5, 10), Stage(2, 100), Stage(1, 1000)]
    start = (1,) * 6
    search = evolution(start, lambda x, rng: switched(made, x, rng), fitness, 12, stages=stages)
    search.step()
    assert seen == [(12, 10, False), (5, 100, False), (3, 1000, True)]
    assert search.parent == start  # nothing was better


def test_a_killed_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    made = units([1] * 8, 3)
    values = np.random.default_rng(0).normal(size=(8, 3))

    def search() -> Evolution:
        return evolution((1,) * 8, lambda x, rng: switched(made, x, rng), of_table(values), 4)

    def checkpoint(folder: Path | None) -> Checkpoint:
        return Checkpoint(folder, "search", "key", 0.0, print)

    whole = search()
    whole.run(12, checkpoint(None), lambda *shown: None)
    first = search()
    first.run(5, checkpoint(tmp_path), lambda *shown: None)
    second = search()
    second.run(12, checkpoint(tmp_path), lambda *shown: None)
    assert second.parent == whole.parent
    assert second.history == whole.history
    assert second.evaluations == whole.evaluations
