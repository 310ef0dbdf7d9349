"""Which trial wins, and why; and the nearest miss where none keeps the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphwright.search.trial import Trial, missed_by


class Ranking:
    """The trials of a search in the order in which they are chosen.

    With one measure the best value comes first. With two the trial comes first that is nearest to
    having the best of both, each measured on the range that it has on the Pareto front; so it
    lies on the front. Of equal trials the earlier one wins.
    """

    def __init__(self, trials: Sequence[Trial], objective: Sequence[str]) -> None:
        self.trials, self.objective = list(trials), tuple(objective)
        self._own = [trial for trial in trials if trial.same_as is None]
        self._again: dict[int, str] = {}

    def best(self) -> list[Trial]:
        """Trials that keep all bounds, the winner first."""
        met = [trial for trial in self._own if trial.is_met]
        if len(self.objective) == 1:
            return sorted(met, key=lambda trial: trial.costs(self.objective))
        return sorted(met, key=lambda trial: self._distance(trial, self.front()))

    def front(self) -> list[Trial]:
        """Trials that keep all bounds and that no other such trial beats in every measure."""
        met = [trial for trial in self._own if trial.is_met]
        costs = {trial.number: trial.costs(self.objective) for trial in met}

        def is_beaten(own: tuple[float, ...]) -> bool:
            return any(
                other != own and all(o <= c for o, c in zip(other, own, strict=True))
                for other in costs.values()
            )

        return [trial for trial in met if not is_beaten(costs[trial.number])]

    def _distance(self, trial: Trial, front: list[Trial]) -> float:
        """From the point that has the best of every measure, in ranges of the front."""
        total = 0.0
        for own, *others in zip(
            trial.costs(self.objective), *(t.costs(self.objective) for t in front), strict=True
        ):
            low, high = min(others), max(others)
            total += ((own - low) / ((high - low) or 1.0)) ** 2
        return total

    def nearest(self) -> Trial | None:
        """The trial that misses its bounds by the least; None where all failed."""
        found = [trial for trial in self._own if not trial.failed]
        return min(found, key=lambda trial: trial.missed, default=None)

    def missed_again(self, trial: Trial, message: str) -> None:
        """Notes that a trial kept the bounds, and missed one when it was built again."""
        self._again[trial.number] = message

    def why(self, winner: Trial) -> str:
        """The reason for the choice, in a sentence."""
        met = sum(1 for trial in self._own if trial.is_met)
        count = f"the {met} of {len(self._own)} candidates that keep all bounds"
        figures = ", ".join(f"{name} {winner.measured[name]:.6g}" for name in self.objective)
        if not winner.is_met:
            text = f"{winner.label} misses the bounds by the least ({figures})"
        elif len(self.objective) == 1:
            text = f"{winner.label} has the best {self.objective[0]} of {count} ({figures})"
        else:
            text = f"{winner.label} is nearest to the best of both measures, of {count} ({figures})"
        for number, message in self._again.items():
            text += f"; trial {number} missed a bound when it was built again: {message}"
        return text

    def miss(self, nearest: Trial) -> str:
        """The message where no candidate keeps the bounds."""
        bounds = [bound for bound in nearest.bounds if not bound.is_met]
        told = "; ".join(f"require.{bound} (missed by {missed_by(bound):.2%})" for bound in bounds)
        told = told or self._again.get(nearest.number, "")
        tried = f"{len(self._own)} candidate{'s' * (len(self._own) != 1)}"
        return f"none of {tried} keeps all bounds; the nearest miss is {nearest.label}: {told}"

    def nothing(self) -> str:
        """The message where no candidate gave a result."""
        if not self._own:
            return "the search had no time for a single candidate"
        first = self._own[0]
        return f"all {len(self._own)} candidates failed; {first.label}: {first.failed}"

    def to_json(self, winner: Trial) -> dict[str, Any]:
        """What the report says of the search."""
        return {
            "objective": list(self.objective),
            "trials": [trial.to_json() for trial in self.trials],
            "winner": winner.number,
            "why": self.why(winner),
            "front": [trial.number for trial in self.front()],
            "seconds": sum(trial.seconds for trial in self.trials),
        }
