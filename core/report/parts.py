"""One report of a model that is several programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphwright.report.model import Report

TOTALS = ("parameters", "weight_bytes", "macs")


def joined(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The parts' reports as one: sums, and rows that name the part they are of.

    Tensors that parts share, as a table of embeddings, count once in each. Fidelity is that of the
    part that is furthest from the original.

    Args:
        reports: contents of `report.json` by part, as `build_report` makes them.
    """
    whole = dict(next(iter(reports.values())))
    whole["model"] = {**whole["model"], **_totals([r["model"] for r in reports.values()])}
    whole["result"] = {
        **whole["result"],
        **_totals([r["result"] for r in reports.values()]),
        "artifacts": [
            {**row, "part": part, "path": f"{part}/{row['path']}"}
            for part, report in reports.items()
            for row in report["result"]["artifacts"]
        ],
    }
    for key in ("passes", "latency", "layers", "stages"):
        whole[key] = _rows({part: report[key] for part, report in reports.items()})
    whole["notes"] = {
        f"{part}.{backend}": notes
        for part, report in reports.items()
        for backend, notes in report["notes"].items()
    }
    whole["fidelity"] = max(
        (report["fidelity"] for report in reports.values()),
        key=lambda error: -1.0 if error["relative"] is None else error["relative"],
    )
    whole["parts"] = {
        part: {
            **{name: report["model"][name] for name in TOTALS},
            **{f"{name}_after": report["result"][name] for name in TOTALS},
        }
        for part, report in reports.items()
    }
    whole["warnings"] = list(dict.fromkeys(w for r in reports.values() for w in r["warnings"]))
    return dict(Report.model_validate(whole).model_dump(mode="json"))


def _rows(by_part: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{**row, "part": part} for part, rows in by_part.items() for row in rows]


def _totals(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the counts; None where a part's is not known. Formulas and sizes are the parts'."""
    found: dict[str, Any] = {}
    for name in TOTALS:
        values = [section[name] for section in sections]
        found[name] = None if None in values else sum(values)
    found["macs_formula"] = " + ".join(s["macs_formula"] for s in sections if s["macs_formula"])
    return found
