"""An elitist evolution with selection in stages (P86, algorithms 1 and 2)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphwright.ir.tune.checkpoint import Checkpoint
from graphwright.passes.search._evolution.levels import Levels

Fitness = Callable[[Sequence[Levels], int, tuple[int, int]], list[float]]
"""(candidates, tokens, (generation, stage)) -> a value each, lower is better, all on one sample of
so many tokens that the pair numbers."""

Mutate = Callable[[Levels, random.Random], "Levels | None"]

MOST_TRIES = 200
"""Mutations per wanted child after which a generation goes on with fewer."""


@dataclass(frozen=True)
class Stage:
    """A selection: how many candidates stay, judged on how many tokens."""

    survivors: int
    tokens: int


@dataclass
class Evolution:
    """The search and its state, which survives a kill.

    Attributes:
        parent: the best so far.
        generation: how many are done.
        history: the parent's fitness on the last stage's sample, per generation.
        evaluations: candidates judged, a candidate of three stages counting three times.
    """

    parent: Levels
    mutate: Mutate
    fitness: Fitness
    stages: Sequence[Stage]
    offspring: int
    seed_of: Callable[[int], int]
    generation: int = 0
    history: list[float] = field(default_factory=list)
    evaluations: int = 0

    def run(
        self, generations: int, checkpoint: Checkpoint, progress: Callable[[str, int, int], None]
    ) -> Levels:
        """Goes on to the given generation; the best candidate."""
        self._load(checkpoint.load())
        while self.generation < generations:
            self.step()
            value = self.history[-1]
            progress(f"fitness {value:.4g}", self.generation, generations)
            if checkpoint.is_due:
                checkpoint.save(self._state())
        checkpoint.save(self._state())
        return self.parent

    def step(self) -> None:
        """One generation: children of the parent, then selection; the parent joins the last stage,
        so that what is worse than it on the same sample never takes its place."""
        rng = random.Random(self.seed_of(self.generation))
        alive = self._children(rng)
        if not alive:
            self.history.append(self.history[-1] if self.history else float("nan"))
            self.generation += 1
            return
        for number, stage in enumerate(self.stages):
            if number == len(self.stages) - 1 and self.parent not in alive:
                alive = [*alive, self.parent]
            values = self.fitness(alive, stage.tokens, (self.generation, number))
            self.evaluations += len(alive)
            order = sorted(range(len(alive)), key=values.__getitem__)
            alive = [alive[i] for i in order[: stage.survivors]]
            best = values[order[0]]
        self.parent = alive[0]
        self.history.append(best)
        self.generation += 1

    def _children(self, rng: random.Random) -> list[Levels]:
        found: dict[Levels, None] = {}
        for _ in range(MOST_TRIES * self.offspring):
            child = self.mutate(self.parent, rng)
            if child is not None and child != self.parent:
                found.setdefault(child)
            if len(found) == self.offspring:
                break
        return list(found)

    def _state(self) -> dict[str, Any]:
        return {"parent": list(self.parent), "generation": self.generation,
                "history": self.history, "evaluations": self.evaluations}  # fmt: skip

    def _load(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.parent = tuple(state["parent"])
        self.generation, self.history = state["generation"], list(state["history"])
        self.evaluations = state["evaluations"]
