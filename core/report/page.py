"""`report.html`: one self-contained page, no script, no network, light and dark."""

from __future__ import annotations

import json
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from graphwright.report.charts import (
    count_text,
    error_text,
    figure_text,
    log_axis,
    log_share,
    metric_text,
    share,
    size_text,
    time_text,
)
from graphwright.report.search import search_block

if TYPE_CHECKING:
    from jinja2 import Template

    from graphwright.ir.program import Program

MAX_ROWS = 240
"""Rows of a table on the page; `report.json` has the rest."""

MAX_DRAWING = 600_000
"""Characters of a drawing; a larger one is left to `graphwright inspect --svg`."""


def render_page(report: dict[str, Any], program: Program | None = None) -> str:
    """The page for a report (contents of `report.json`).

    Every text goes through jinja2's autoescape: names come from models nobody vouches for.

    Args:
        report: see `graphwright.report.model.Report`.
        program: the program after all passes, to be drawn; no drawing when None.
    """
    page = _template().render(
        report=report,
        title=PurePath(report["model"]["source"]).name or report["model"]["source"],
        tiles=tiles(report),
        passes=pass_rows(report["passes"]),
        sizes=size_rows(report),
        latency=latency_rows(report["latency"]),
        layers=layer_rows(report["layers"]),
        search=search_block(report.get("search")),
        backends=[note_block(name, notes) for name, notes in report["notes"].items()],
        drawings=[] if program is None else drawings(program),
        max_rows=MAX_ROWS,
    )
    return page


@cache
def _template() -> Template:
    """The page's template, compiled once in a process."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("graphwright.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": size_text, "count": count_text, "seconds": time_text, "error": error_text,
        "text": as_text, "figure": figure_text,
    }  # fmt: skip
    return environment.get_template("report.html.j2")


def tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: what a reader came for."""
    before, after = report["model"], report["result"]
    ratio = before["weight_bytes"] / max(after["weight_bytes"], 1)
    found = [
        {
            "title": "Weights",
            "value": size_text(after["weight_bytes"]),
            "detail": f"from {size_text(before['weight_bytes'])}, {ratio:.2f}× smaller"
            if ratio > 1.005
            else f"from {size_text(before['weight_bytes'])}",
        }
    ]
    if report["latency"]:
        best = max(report["latency"], key=lambda row: row["speedup"])
        found.append(
            {
                "title": "Latency",
                "value": f"{best['after_ms']:.2f} ms",
                "detail": f"from {best['before_ms']:.2f} ms, {best['speedup']:.2f}× "
                f"({best['backend']}, {best['threads']} threads)",
            }
        )
    error = report["fidelity"]
    if error["max_abs"] == 0:
        value, detail = "exact", "outputs equal the original's"
    else:
        value = "none" if error["cosine"] is None else figure_text(error["cosine"])
        detail = f"cosine of all output values; {error_text(error).split(',')[0]}"
    found.append({"title": "Fidelity", "value": value, "detail": detail})
    if report["evaluation"]:
        row = report["evaluation"]
        start = "none" if row["before"] is None else figure_text(row["before"])
        end = metric_text(row["after"], exact=row.get("exact", False))
        name = row["metric"].rpartition(":")[2].capitalize()
        found.append({"title": name, "value": end, "detail": f"from {start}"})
    return found


def pass_rows(passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chain: every pass with the lengths of its bars."""
    seconds = [row["seconds"] for row in passes]
    low, high = log_axis(row["error"]["relative"] for row in passes)
    rows = []
    for row in passes:
        done = [action for action in row["actions"] if action[3]]
        left = [action for action in row["actions"] if not action[3]]
        rows.append(
            {
                **row,
                "time_bar": share(row["seconds"], seconds),
                "error_bar": log_share(row["error"]["relative"], low, high),
                "done": done,
                "left": left,
            }
        )
    return rows


def size_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of bytes: weights before and after, and the files written."""
    rows = [
        {"label": "weights, original", "bytes": report["model"]["weight_bytes"], "kind": "before"},
        {"label": "weights, result", "bytes": report["result"]["weight_bytes"], "kind": "after"},
    ]
    rows += [
        {"label": artifact["path"], "bytes": artifact["file_bytes"], "kind": "after"}
        for artifact in report["result"]["artifacts"]
    ]
    return [{**row, "bar": share(row["bytes"], [r["bytes"] for r in rows])} for row in rows]


def latency_rows(latency: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of milliseconds: the original once, then every artifact."""
    if not latency:
        return []
    first = latency[0]
    rows = [("original, torch eager", first["before_ms"], first.get("before_iqr_ms"), "before")]
    rows += [
        (f"{r['backend']}, {r['speedup']:.2f}×", r["after_ms"], r.get("after_iqr_ms"), "after")
        for r in latency
    ]
    longest = [ms for _, ms, _, _ in rows]
    return [
        {"label": label, "ms": ms, "iqr": iqr, "kind": kind, "bar": share(ms, longest)}
        for label, ms, iqr, kind in rows
    ]


def layer_rows(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of the error at each layer's output, on one logarithmic axis."""
    low, high = log_axis(row["relative"] for row in layers)
    weighty = [row for row in layers if row["macs"] or row["parameters"]]
    return [
        {
            **row,
            "bar": log_share(row["relative"], low, high),
            "state": "gone" if row["relative"] is None else "same" if not row["relative"] else "",
        }
        for row in weighty
    ]


def note_block(name: str, notes: Any) -> dict[str, Any]:
    """A backend's notes sorted by shape: counts to bars, lists to lists, the rest to pairs."""
    block: dict[str, Any] = {"name": name, "counts": [], "lists": [], "pairs": []}
    for key, value in notes.items() if isinstance(notes, dict) else [("", notes)]:
        if _is_counts(value):
            ordered = sorted(value.items(), key=lambda item: (-item[1], item[0]))
            bars = [(label, n, share(n, value.values())) for label, n in ordered]
            block["counts"].append((key, bars))
        elif isinstance(value, list) and value:
            block["lists"].append((key, value))
        elif isinstance(value, dict) and value:
            block["lists"].append((key, [f"{k}: {as_text(v)}" for k, v in value.items()]))
        else:
            block["pairs"].append((key, value))
    return block


def _is_counts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value.values())
    )


def drawings(program: Program) -> list[tuple[str, str, str]]:
    """(title, remark, SVG) of the program, coarse and fine; the SVG is escaped and safe."""
    from graphwright.ir.view.drawing import draw
    from graphwright.ir.view.table import module_blocks, op_blocks

    found = []
    for level, title, graph in [
        ("module", "By module", module_blocks(program)),
        ("op", "By operator", op_blocks(program)),
    ]:
        remark = f"{len(graph)} blocks" if level == "module" else f"{len(graph)} operators"
        picture = draw(program, level) if len(graph) < 1500 else ""  # type: ignore[arg-type]
        if not picture or len(picture) > MAX_DRAWING:
            picture = ""
            remark = f"{remark}: too many for this page; `graphwright inspect --svg` draws them"
        found.append((title, remark, picture))
    return found


def as_text(value: Any) -> str:
    """A value of a report for people: text as it is, figures short, the rest as JSON."""
    if isinstance(value, str):
        return value
    if value in ({}, []):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return figure_text(value)
    if isinstance(value, list) and all(isinstance(item, (str, int)) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, int) else str(value)
