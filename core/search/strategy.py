"""Which candidates a search tries: all of a grid in order, or those that Optuna proposes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from graphwright.ir.errors import ArgumentError
from graphwright.search.trial import Trial

if TYPE_CHECKING:
    from graphwright.specs.document import Node
    from graphwright.specs.search import SearchSection
    from graphwright.specs.space import Choice, Space

Drawn = list[tuple["Choice", "Node"]]

_SMALLEST_POPULATION, _LARGEST_POPULATION = 4, 50
_GENERATIONS = 5
"""Generations that fit into the trials, where the population is not cut off."""


class Strategy(Protocol):
    """Proposes candidates, one after the other, and is told what became of each."""

    def propose(self) -> Drawn | None:
        """The next candidate; None where there is none left."""

    def tell(self, trial: Trial) -> None:
        """What became of the candidate that was proposed last."""


def strategy_of(section: SearchSection, space: Space, seed: int) -> Strategy:
    """The strategy that a spec asks for.

    What it proposes depends on the seed and on what it is told, and on nothing else: a search
    that is told the same again goes the same way.

    Raises:
        ArgumentError: Optuna is not installed.
    """
    if section.strategy == "grid":
        return Grid(space)
    return Proposed(section, space, seed)


class Grid:
    """All candidates; the last choice of the space turns fastest."""

    def __init__(self, space: Space) -> None:
        self._left: Iterator[Drawn] = space.all_picks()

    def propose(self) -> Drawn | None:
        return next(self._left, None)

    def tell(self, trial: Trial) -> None:
        pass  # it goes its way in any case


class Proposed:
    """Candidates of a sampler of Optuna, asked and told in this process."""

    def __init__(self, section: SearchSection, space: Space, seed: int) -> None:
        optuna = _optuna(section.strategy)
        self._space, self._objective = space, section.objective
        self._failed = optuna.trial.TrialState.FAIL
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it announces every study
        try:
            self._study = optuna.create_study(
                directions=["minimize"] * len(section.objective),
                sampler=_sampler(optuna, section, seed),
            )
        finally:
            optuna.logging.set_verbosity(level)
        self._asked: Any = None

    def propose(self) -> Drawn | None:
        self._asked = self._study.ask()
        drawn: Drawn = []
        for choice in self._space.choices:
            if self._space.is_asked(choice, drawn):
                drawn.append((choice, _drawn(self._asked, choice)))
        return drawn

    def tell(self, trial: Trial) -> None:
        if trial.failed:
            self._study.tell(self._asked, state=self._failed)
        else:
            self._asked.set_constraint("require", trial.missed)
            self._study.tell(self._asked, trial.costs(self._objective))


def _drawn(asked: Any, choice: Choice) -> Node:
    """A value of the choice: listed ones are drawn by their index, for they may be mappings."""
    span = choice.range
    if span is None:
        index: int = asked.suggest_categorical(choice.path, range(len(choice.values)))
        return choice.values[index]
    if span.is_whole:
        step = 1 if span.log else span.step
        value = asked.suggest_int(choice.path, span.low, span.high, step=step, log=span.log)
    else:
        value = asked.suggest_float(choice.path, span.low, span.high, step=span.step, log=span.log)
    return choice.number(value)


def _optuna(strategy: str) -> Any:
    try:
        import optuna
    except ImportError:
        raise ArgumentError(
            f"strategy {strategy} of the search is Optuna's, which is not installed",
            where="search.strategy",
            fix="Install the extra: pip install 'graphwright[search]'; or use `strategy: grid`.",
        ) from None
    return optuna


def _sampler(optuna: Any, section: SearchSection, seed: int) -> Any:
    samplers, seed = optuna.samplers, seed % 2**32  # what numpy takes
    if section.strategy == "random":
        return samplers.RandomSampler(seed=seed)
    if section.strategy == "tpe":
        return samplers.TPESampler(seed=seed)
    wanted = (section.trials or _LARGEST_POPULATION) // _GENERATIONS
    size = max(_SMALLEST_POPULATION, min(_LARGEST_POPULATION, wanted))
    return samplers.NSGAIISampler(seed=seed, population_size=size)
