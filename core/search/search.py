"""The search of a spec: candidate after candidate, then the winner as an ordinary run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError, RequirementError, SpecError
from graphwright.job.diffusion import is_diffusion
from graphwright.job.progress import Progress
from graphwright.job.stages import Outcome, compiled
from graphwright.search.choice import Ranking
from graphwright.search.log import Log, candidate_key
from graphwright.search.proof import refuse_impossible
from graphwright.search.strategy import Drawn, strategy_of
from graphwright.search.trial import Trial, bounds_of, measures_of
from graphwright.search.worker import Worker
from graphwright.specs.space import Space
from graphwright.specs.spec import Spec, candidate_spec
from graphwright.specs.written import written_specs

if TYPE_CHECKING:
    from graphwright.job.place import OutputPlace
    from graphwright.job.run import JobSettings

MOST_REPEATS = 50
"""Proposals in a row that were all tried before, after which a search ends."""


def searched(source: str | Path, spec: Spec, settings: JobSettings, place: OutputPlace) -> Outcome:
    """Runs the search of a spec and compiles its winner, in a place that is locked already.

    Raises:
        RequirementError: no candidate keeps the bounds; the message names the nearest miss.
        GraphwrightError: the model cannot be opened, or the winner cannot be compiled.
    """
    if not place.is_main:
        raise ArgumentError("a search is one process", fix="Start it without a launcher.")
    if is_diffusion(source):
        raise ArgumentError(
            "a search compiles one model, and this folder is a pipeline of several",
            where="search",
            fix="Search on the folder of one of its models.",
        )
    if not settings.resume:
        shutil.rmtree(place.search_work, ignore_errors=True)
    settings = replace(settings, shared=place.search_work / "checkpoints", resume=True)
    search = Search(source, spec, settings, place)
    try:
        trials = search.trials()
    finally:
        search.worker.close()
    return search.built(trials)


class Search:
    """One search: its space, the process of its candidates, and what they gave."""

    def __init__(
        self, source: str | Path, spec: Spec, settings: JobSettings, place: OutputPlace
    ) -> None:
        assert spec.search is not None
        self.source, self.spec, self.settings, self.place = source, spec, settings, place
        self.section = spec.search
        self.space = Space.of(spec.document)
        self.log = Log(place.search_work / "trials.jsonl")
        quiet = replace(settings, quiet=True, latency=self._measures_latency())
        self.worker = Worker(source, quiet, place.search_work)
        self.candidates: dict[int, Spec] = {}
        """By number of the trial, where the values go together."""
        self._by_key: dict[str, Trial] = {}

    def _measures_latency(self) -> bool:
        require = self.spec.require
        bounds = (require.min_speedup, require.max_latency_ms)
        return bounds != (None, None) or bool({"latency_ms", "speedup"} & {*self.section.objective})

    def trials(self) -> list[Trial]:
        """Tries candidates until the budget is spent or none is left.

        Raises:
            RequirementError: a bound cannot be kept by any.
        """
        strategy = strategy_of(self.section, self.space, self.spec.seed)
        candidates = written_specs(self.spec)
        with Progress(quiet=self.settings.quiet) as progress, progress.stage("search"):
            facts = self.worker.facts(candidates[0])
            refuse_impossible(self.spec, candidates, self.space, facts["elements"])
            self._model = facts["sha256"]
            found: list[Trial] = []
            while self._goes_on(found) and (drawn := strategy.propose()) is not None:
                trial = self._trial(len(found), drawn, found)
                found.append(trial)
                strategy.tell(trial)
                progress.note(self._line(trial))
                progress.update(trial.label, len(found), self.section.trials or 0)
        return found

    def _goes_on(self, found: Sequence[Trial]) -> bool:
        trials = self.section.trials
        if trials is not None and len(found) >= trials:
            return False
        latest = found[-MOST_REPEATS:]
        if len(latest) == MOST_REPEATS and all(trial.same_as is not None for trial in latest):
            return False
        return self._left(found) is None or bool(self._left(found))

    def _left(self, found: Sequence[Trial]) -> float | None:
        """Seconds that are left of the budget; None where there is no end."""
        if self.section.minutes is None:
            return None
        return max(0.0, self.section.minutes * 60 - sum(trial.seconds for trial in found))

    def _trial(self, number: int, drawn: Drawn, found: Sequence[Trial]) -> Trial:
        values = {choice.path: value.plain() for choice, value in drawn}
        try:
            spec = candidate_spec(self.spec, self.space, drawn)
        except SpecError as error:
            return Trial(number, values, failed=f"no valid spec: {error.problems[0].message}")
        around = {
            "model": self._model,
            "device": self.settings.device,
            "latency": self._measures_latency(),
        }
        key = candidate_key(spec, around)
        self.candidates[number] = spec
        if key in self._by_key:
            return replace(self._by_key[key].repeated(number), values=values)
        row = self._row(key, spec, found)
        trial = Trial(number, values, seconds=row["seconds"], failed=row["failed"])
        if (figures := row["figures"]) is not None:
            measured = measures_of(figures)
            absent = [name for name in self.section.objective if measured[name] is None]
            failed = f"{absent[0]} could not be measured" if absent else ""
            bounds = bounds_of(self.spec.require, figures)
            trial = replace(trial, measured=measured, bounds=bounds, failed=failed)
        self._by_key[key] = trial
        return trial

    def _row(self, key: str, spec: Spec, found: Sequence[Trial]) -> dict[str, Any]:
        """What the candidate gives, or gave in an earlier run of the search."""
        minutes = self.section.trial_minutes
        limits = [None if minutes is None else minutes * 60, self._left(found)]
        limit = min((value for value in limits if value is not None), default=None)
        row = self.log.find(key, limit)
        if row is None:
            free = replace(spec, require=type(spec.require)())
            answer = self.worker.run(free, limit)
            row = {
                "key": key, "figures": answer.figures, "failed": answer.failed,
                "seconds": answer.seconds, "stopped_at": limit if answer.is_stopped else None,
            }  # fmt: skip
            self.log.add(row)
        return row

    def _line(self, trial: Trial) -> str:
        """A trial on the console."""
        if trial.same_as is not None:
            return f"{trial.label}: the same candidate as trial {trial.same_as}"
        if trial.failed:
            return f"{trial.label} failed, and the search goes on: {trial.failed}"
        shown = ", ".join(f"{name} {trial.measured[name]:.6g}" for name in self.section.objective)
        missed = "; ".join(str(bound) for bound in trial.bounds if not bound.is_met)
        return f"{trial.label}: {shown}" + (f"; misses {missed}" if missed else "")

    def built(self, trials: list[Trial]) -> Outcome:
        """Compiles the winner.

        A bound on time may be kept in a trial and missed when the same candidate is built again:
        then the next one takes its place, and the report says so.
        """
        ranking = Ranking(trials, self.section.objective)
        for winner in ranking.best():
            try:
                return self._compiled(winner, ranking)
            except RequirementError as error:
                ranking.missed_again(winner, error.message)
        nearest = ranking.nearest()
        if nearest is None:
            raise RequirementError(ranking.nothing())
        try:
            return self._compiled(nearest, ranking)
        except RequirementError as error:
            raise RequirementError(ranking.miss(nearest), fix=error.fix) from None

    def _compiled(self, trial: Trial, ranking: Ranking) -> Outcome:
        number = trial.number if trial.same_as is None else trial.same_as
        record = {
            "strategy": self.section.strategy,
            "seed": self.spec.seed,
            **ranking.to_json(trial),
        }
        return compiled(self.source, self.candidates[number], self.settings, self.place, record)
