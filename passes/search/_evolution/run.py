"""What the searches share: their options, and the run of one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from graphwright.ir.action import Action
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.digest import digest
from graphwright.ir.options import Bounded, Rule, Targets
from graphwright.ir.program import Program
from graphwright.ir.tune.checkpoint import Checkpoint, make_key
from graphwright.passes.search._evolution.evolve import Evolution, Mutate, Stage
from graphwright.passes.search._evolution.fitness import Database, Fitness, Measure
from graphwright.passes.search._evolution.levels import Levels, total

AGREE = 0.05
"""Largest relative distance between what trials promised and what the result gives."""


class EvolutionOptions(Bounded, Targets):
    """Options of the evolution."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("tokens", "len(tokens) == len(survivors)",
             "tokens {tokens} and survivors {survivors} are one value per stage of selection each"),
        Rule("survivors",
             "survivors[-1] == 1 and all(a >= b for a, b in zip(survivors, survivors[1:]))",
             "survivors {survivors} fall from stage to stage, to one"),
    )  # fmt: skip

    measure: Measure = "kl"
    """What a candidate is judged by: `kl`, the divergence of its outputs, as logits, from the
    program's own; `mse`, their squared error relative to the program's outputs."""

    offspring: Annotated[int, Field(ge=1)] = 64
    """Candidates made in every generation."""

    survivors: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (8, 2, 1)
    """Candidates that are left behind every stage of selection."""

    tokens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (
        2048, 16384, 65536)  # fmt: skip
    """Rows of the output (tokens of text, else samples) that a stage looks at: drawn anew from the
    calibration data in every generation, all of it where there is less."""


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        program: with every unit at its level.
        levels: the winner.
        metrics: figures for the report.
        notes: what a reader should know.
    """

    program: Program
    levels: Levels
    metrics: dict[str, float]
    notes: tuple[Action, ...]


class Search:
    """One search over a database.

    Args:
        database: of the levels.
        program: the one to stay near to.
        options: of the evolution.
        context: data, seed, work folder.
        by: id of the pass.
    """

    def __init__(
        self, database: Database, program: Program, options: EvolutionOptions, context: Context,
        by: str,
    ) -> None:  # fmt: skip
        self.database, self.program, self.options = database, program, options
        self.context, self.by = context, by
        self.fitness = Fitness(database, program, context.batches, options.measure, context)

    def best_of(self, candidates: Sequence[Levels]) -> Levels:
        """The best on one sample of the first stage's size."""
        distinct = list(dict.fromkeys(candidates))
        if len(distinct) == 1:
            return distinct[0]
        values = self.fitness(distinct, self.options.tokens[0], (-1, 0))
        return distinct[values.index(min(values))]

    def rng(self, *path: str | int) -> random.Random:
        """Random numbers of their own for `path`."""
        return random.Random(self.context.generator(*path).initial_seed())

    def run(self, start: Levels, mutate: Mutate, generations: int) -> Found:
        """Evolves `start`.

        Raises:
            ModelError: the result is not what trials promised, because the compressor does more
                than to give layers other weights.
        """
        o = self.options
        stages = [Stage(s, t) for s, t in zip(o.survivors, o.tokens, strict=True)]
        evolution = Evolution(
            start, mutate, self.fitness, stages, o.offspring,
            lambda generation: self.context.generator("generation", generation).initial_seed(),
        )  # fmt: skip
        levels = evolution.run(generations, self._checkpoint(start), self.context.progress)
        rows = self.fitness.rows
        first, last = self.fitness([start, levels], None)
        units, program = self.database.units, self.database.made(levels)
        real = self.fitness.of_program(program)
        if abs(real - last) > AGREE * max(abs(last), 1e-3):
            raise ModelError(
                f"{self.by}: the result's distance is {real:.4g} where trials promised {last:.4g}",
                fix="Choose a compressor that gives layers other weights and nothing else.",
            )
        metrics = {
            "distance_at_start": first, "distance": real,
            "cost": float(total(units, levels)), "cost_at_start": float(total(units, start)),
            "evaluations": float(evolution.evaluations),
        }  # fmt: skip
        short = rows < o.tokens[-1]
        what = f"{rows} rows in the last stage of selection, {generations} generations"
        why = f"the data has no {o.tokens[-1]} rows: that stage saw all of it" if short else ""
        return Found(program, levels, metrics, (Action("search", what, why),))

    def _checkpoint(self, start: Levels) -> Checkpoint:
        context = self.context
        key = make_key(
            run=context.key, program=digest(self.program), seed=context.seed, scope=context.scope,
            options=self.options.model_dump(mode="json"), start=start, by=self.by,
        )  # fmt: skip
        stem = f"search-{make_key(scope=context.scope)[:12]}"
        return Checkpoint(context.work, stem, key, context.checkpoint_seconds, context.warn)
