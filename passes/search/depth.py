"""search.depth: which branches beside skips a network can do without, found by evolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Action, Pass, Result
from graphwright.passes.search._evolution.cost import evolution
from graphwright.passes.search._evolution.depth import Depth as Database
from graphwright.passes.search._evolution.levels import Levels, Unit, switched
from graphwright.passes.search._evolution.run import EvolutionOptions, Search

STARTS = 64
"""Random candidates of which the best begins (P86, section 4)."""


class DepthOptions(EvolutionOptions):
    """Options of search.depth."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the branches that go: of those with an attention and of the others, rounded."""

    generations: Annotated[int, Field(ge=1)] | None = None
    """Generations of the evolution; k (n - k) / 1.5 for k of n branches when absent."""

    offspring: Annotated[int, Field(ge=1)] = 32
    """Candidates made in every generation."""

    survivors: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 1)
    """Candidates that are left behind every stage of selection."""

    tokens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2048, 32768)
    """Rows of the output (tokens of text, else samples) that a stage looks at: drawn anew from the
    calibration data in every generation, all of it where there is less."""


class Depth(Pass[DepthOptions]):
    """Removes whole branches, x + f(x) becoming x: those that evolution finds to matter least.

    Branches with an attention and others are told apart, and of each kind as many go as `target`
    says. Children of the best choice so far put some branches back and take as many others of
    their kind away; selection is as in `search.bits`. Branches of an attention over a cache still
    compute the keys and values that are outputs.

    Source: Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search" (P86), section 4 and the released settings.
    """

    contract = "lossy"
    needs = "calibration"
    weights = "reformed"
    papers = ("P86",)
    before = ("quantize.*",)

    def cost(self, load: Load) -> Work:
        # branches are not told apart before the run: two for every block of about six layers
        branches = max(len(load.layers) // 3, 1)
        count = max(round(self.options.target * branches), 1)
        generations = self.options.generations or math.ceil(count * (branches - count) / 1.5)
        return super().cost(load) + evolution(load, self.options, max(generations, 1))

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        database = Database(program, o.targets, self.id)
        units = database.units
        removed = {group: round(o.target * sum(u.group == group for u in units))
                   for group in dict.fromkeys(u.group for u in units)}  # fmt: skip
        count = sum(removed.values())
        if count == 0:
            raise ModelError(
                f"{self.id}: {o.target:g} of {len(units)} branches is none",
                fix="Raise `target`, or widen `targets`.",
            )
        search = Search(database, program, o, context, self.id)
        rng = search.rng("start")
        starts = [_drawn(units, removed, rng.sample) for _ in range(STARTS)]
        generations = o.generations or math.ceil(count * (len(units) - count) / 1.5) or 1
        start = search.best_of(starts)
        found = search.run(start, lambda levels, rng: switched(units, levels, rng), generations)
        actions = [
            Action.left(unit.name, "it matters more") if level else Action(unit.name, "removed")
            for unit, level in zip(units, found.levels, strict=True)
        ]
        metrics = {**found.metrics, "branches": float(len(units)), "removed": float(count)}
        return Result(found.program, (*actions, *found.notes), metrics)


def _drawn(
    units: list[Unit], removed: dict[str, int], sample: Callable[[list[int], int], list[int]]
) -> Levels:
    """A candidate with so many branches of each group removed, drawn at random."""
    gone: set[int] = set()
    for group, count in removed.items():
        gone |= set(sample([i for i, unit in enumerate(units) if unit.group == group], count))
    return tuple(0 if i in gone else 1 for i in range(len(units)))
