"""The bounds of the spec's `require` section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.specs.sections import RequireSection


@dataclass(frozen=True)
class Bound:
    """One bound and what was measured.

    Attributes:
        name: as in the spec, `max_drop`.
        bound: the value asked for.
        measured: the value found; None when it could not be measured, which counts as missed.
        what: what the figure is of, as `onnxruntime`.
    """

    name: str
    bound: float
    measured: float | None
    what: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the bound holds."""
        if self.measured is None:
            return False
        if self.name.startswith("min_") or self.name == "integer_kernels":
            return self.measured >= self.bound
        return self.measured <= self.bound

    def __str__(self) -> str:
        of = f" ({self.what})" if self.what else ""
        found = "not measured" if self.measured is None else f"{self.measured:.4g}"
        return f"{self.name}: {found}{of}, bound {self.bound:.4g}"

    def to_json(self) -> dict[str, Any]:
        """Row of the report."""
        return {
            "name": self.name,
            "bound": self.bound,
            "measured": self.measured,
            "what": self.what,
            "met": self.is_met,
        }


def check_bounds(
    section: RequireSection | None,
    *,
    evaluation: Mapping[str, Any] | None,
    cosine: float | None,
    latency: list[dict[str, Any]],
    artifacts: list[dict[str, Any]],
    peak_rss_bytes: int,
    seconds: float,
    notes: Mapping[str, Mapping[str, Any]],
) -> list[Bound]:
    """Every bound of the section with its measurement; a bound per backend where that applies."""
    if section is None:
        return []
    bounds: list[Bound] = []
    if section.max_drop is not None:
        drop = None if evaluation is None else evaluation["drop"]
        bounds.append(Bound("max_drop", section.max_drop, drop))
    if section.perplexity_ratio is not None:
        bounds.append(_perplexity_ratio(section.perplexity_ratio, evaluation))
    if section.min_cosine is not None:
        bounds.append(Bound("min_cosine", section.min_cosine, cosine))
    bounds += _of_latency("min_speedup", section.min_speedup, latency, "speedup")
    bounds += _of_latency("max_latency_ms", section.max_latency_ms, latency, "after_ms")
    if section.max_file_mb is not None:
        bounds += [
            Bound("max_file_mb", section.max_file_mb, a["file_bytes"] / 1e6, a["backend"])
            for a in artifacts
        ]
    if section.max_rss_gb is not None:
        bounds.append(Bound("max_rss_gb", section.max_rss_gb, peak_rss_bytes / 1e9))
    if section.max_minutes is not None:
        bounds.append(Bound("max_minutes", section.max_minutes, seconds / 60))
    if section.integer_kernels is not None:
        bounds += [_integer_kernels(backend, note) for backend, note in notes.items()] or [
            Bound("integer_kernels", 1, None, "no artifact")
        ]
    return bounds


def _of_latency(
    name: str, bound: float | None, latency: list[dict[str, Any]], key: str
) -> list[Bound]:
    """A bound per artifact on a figure of its row; missed where nothing was measured."""
    if bound is None:
        return []
    rows = latency or [{key: None, "backend": "no artifact"}]
    return [Bound(name, bound, row[key], row["backend"]) for row in rows]


def _perplexity_ratio(bound: float, evaluation: Mapping[str, Any] | None) -> Bound:
    """The result's perplexity by the original's; missed where another metric was taken."""
    name = "perplexity_ratio"
    if evaluation is None or evaluation["metric"] != "perplexity":
        return Bound(name, bound, None, "needs `evaluate: {metric: perplexity}`")
    before, after = evaluation["before"], evaluation["after"]
    return Bound(name, bound, None if None in (before, after) else after / before)


def _integer_kernels(backend: str, note: Mapping[str, Any]) -> Bound:
    """Layers that were quantized, as the bound, and those of them that are integer kernels."""
    counts = note.get("integer_kernels")
    if counts is None:
        return Bound("integer_kernels", 1, None, f"{backend}: no layer with int8 weights seen")
    left = ", ".join(counts["float"])
    what = f"{backend}; in float: {left}" if left else backend
    return Bound("integer_kernels", counts["quantized"], counts["integer"], what)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each bound of a report that does not hold."""
    return [
        f"require.{Bound(row['name'], row['bound'], row['measured'], row['what'])}"
        for row in rows
        if not row["met"]
    ]
