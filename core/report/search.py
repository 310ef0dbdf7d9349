"""The search on the page: a picture of all candidates, and their table."""

from __future__ import annotations

import math
from typing import Any

from graphwright.report.charts import figure_text

OTHER = {"cosine": "file_mb"}
"""The second axis where a search has one measure; `cosine` beside any other one."""


def search_block(search: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of a search (`search` of `report.json`); None where there was none."""
    if search is None:
        return None
    first = search["objective"][0]
    axes = [*search["objective"], OTHER.get(first, "cosine")][:2]
    shown = [trial for trial in search["trials"] if trial["same_as"] is None]
    return {
        **search,
        "axes": axes,
        "points": points(shown, axes, search["front"], search["winner"]),
        "shown": shown,
        "repeats": len(search["trials"]) - len(shown),
    }


def points(
    trials: list[dict[str, Any]], axes: list[str], front: list[int], winner: int
) -> dict[str, Any]:
    """Places of the candidates in a picture of 100 by 100, and the ends of both axes."""
    found = [
        (trial, *(trial["measured"][axis] for axis in axes))
        for trial in trials
        if not trial["failed"] and all(_is_figure(trial["measured"].get(a)) for a in axes)
    ]
    ends = [_ends([row[1 + axis] for row in found]) for axis in (0, 1)]
    rows = [
        {
            "number": trial["number"],
            "x": _place(x, *ends[0]),
            "y": 100 - _place(y, *ends[1]),
            "kind": _kind(trial, front, winner),
            "text": f"trial {trial['number']}: {axes[0]} {figure_text(x)}, "
            f"{axes[1]} {figure_text(y)}",
        }
        for trial, x, y in found
    ]
    return {"rows": rows, "ends": [[figure_text(value) for value in pair] for pair in ends]}


def _is_figure(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _kind(trial: dict[str, Any], front: list[int], winner: int) -> str:
    if trial["number"] == winner:
        return "winner"
    if not trial["met"]:
        return "missed"
    return "front" if trial["number"] in front else "met"


def _ends(values: list[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 0.0)


def _place(value: float, low: float, high: float) -> float:
    """Between 4 and 96, so that a point at an end is seen whole."""
    return 4 + 92 * (value - low) / (high - low) if high > low else 50.0
