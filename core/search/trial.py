"""One candidate of a search: what it was, what was measured, and how far it is from the bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graphwright.job.require import Bound, check_bounds

if TYPE_CHECKING:
    from graphwright.specs.sections import RequireSection

LARGER_IS_BETTER = ("speedup", "cosine")
"""Measures that a search makes large; it makes the others small."""

UNMEASURED = 1e6
"""What a bound counts as missed by, relative to itself, where nothing was measured."""


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        number: place in the search, from 0.
        values: by place of the spec, what the candidate has there.
        measured: figures by measure; None where one was not measured.
        bounds: the bounds of `require` with what was measured.
        seconds: time that it took.
        failed: why it gave no result; empty where it gave one.
        same_as: number of an earlier trial that was the same candidate.
    """

    number: int
    values: dict[str, Any]
    measured: dict[str, float | None] = field(default_factory=dict)
    bounds: tuple[Bound, ...] = ()
    seconds: float = 0.0
    failed: str = ""
    same_as: int | None = None

    @property
    def missed(self) -> float:
        """Sum over the bounds of how far each is missed, relative to itself; 0 where all hold."""
        return sum(missed_by(bound) for bound in self.bounds)

    @property
    def is_met(self) -> bool:
        """Whether it gave a result that keeps all bounds."""
        return not self.failed and all(bound.is_met for bound in self.bounds)

    @property
    def label(self) -> str:
        """The candidate in one line: `trial 3 (passes.1.bits 4)`."""
        chosen = ", ".join(f"{place} {value_text(value)}" for place, value in self.values.items())
        return f"trial {self.number} ({chosen})" if chosen else f"trial {self.number}"

    def costs(self, objective: Sequence[str]) -> tuple[float, ...]:
        """The measures of the objective, each with the sign that makes small ones good."""
        found = []
        for measure in objective:
            value = self.measured[measure]
            assert value is not None
            found.append(-value if measure in LARGER_IS_BETTER else value)
        return tuple(found)

    def repeated(self, number: int) -> Trial:
        """The same candidate under a later number; it took no time."""
        first = self.number if self.same_as is None else self.same_as
        return replace(self, number=number, seconds=0.0, same_as=first)

    def to_json(self) -> dict[str, Any]:
        """Row of the report."""
        return {
            "number": self.number,
            "values": self.values,
            "measured": self.measured,
            "require": [bound.to_json() for bound in self.bounds],
            "met": self.is_met,
            "missed_by": self.missed,
            "seconds": self.seconds,
            "failed": self.failed,
            "same_as": self.same_as,
        }


def missed_by(bound: Bound) -> float:
    """How far a bound is missed, relative to itself; 0 where it holds."""
    if bound.is_met:
        return 0.0
    if bound.measured is None:
        return UNMEASURED
    return abs(bound.measured - bound.bound) / (abs(bound.bound) or 1.0)


def value_text(value: Any) -> str:
    """A value of a candidate in one line, as a spec has it."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {{{', '.join(f'{k}: {v}' for k, v in (inner or {}).items())}}}"
            if isinstance(inner, dict)
            else f"{key}"
            for key, inner in value.items()
        )
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def figures_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a search keeps of a candidate's report: enough for every measure and every bound."""
    return {
        "artifacts": [
            {key: row[key] for key in ("backend", "file_bytes")}
            for row in report["result"]["artifacts"]
        ],
        "cosine": report["fidelity"]["cosine"],
        "evaluation": report["evaluation"],
        "latency": [
            {key: row[key] for key in ("backend", "before_ms", "after_ms", "speedup")}
            for row in report["latency"]
        ],
        "notes": {
            name: {"integer_kernels": notes["integer_kernels"]}
            if notes.get("integer_kernels") is not None
            else {}
            for name, notes in report["notes"].items()
        },
        "peak_rss_bytes": report["peak_rss_bytes"],
        "seconds": report["seconds"],
    }


def measures_of(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Every measure that an objective can name; of several artifacts, the worst."""
    latency, evaluation = figures["latency"], figures["evaluation"]
    return {
        "file_mb": max(row["file_bytes"] for row in figures["artifacts"]) / 1e6,
        "latency_ms": max((row["after_ms"] for row in latency), default=None),
        "speedup": min((row["speedup"] for row in latency), default=None),
        "cosine": figures["cosine"],
        "drop": None if evaluation is None else evaluation["drop"],
    }


def bounds_of(require: RequireSection, figures: Mapping[str, Any]) -> tuple[Bound, ...]:
    """The bounds of the spec with the figures of a candidate."""
    return tuple(check_bounds(require, **figures))
