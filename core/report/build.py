"""The report of a run: `report.json`, `report.html`, and the summary on the console."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.atomic import write_atomically
from graphwright.report.model import Report

if TYPE_CHECKING:
    from rich.console import Console

    from graphwright.ir.check.fidelity import Fidelity
    from graphwright.ir.files import LoadedModel
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program

_PACKAGES = (
    "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "triton", "transformers",
    "diffusers", "numpy", "networkx",
)  # fmt: skip


def build_report(
    *,
    source: LoadedModel,
    original: Program,
    program: Program,
    passes: list[dict[str, Any]],
    artifacts: list[dict[str, Any]],
    fidelity: Fidelity,
    evaluation: dict[str, Any] | None,
    latency: list[dict[str, Any]],
    notes: dict[str, Any],
    require: list[dict[str, Any]],
    warnings: list[str],
    code: list[str],
    seconds: float,
    peak_rss_bytes: int,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Contents of `report.json`: see `graphwright.report.model.Report`.

    Counts parameters, bytes and multiply-accumulates of both programs, and measures the error at
    every layer they share on the example inputs. Fidelity is that of what is handed over: of the
    artifact that is furthest from the original, or of the program where nothing is lowered.
    """
    from graphwright.ir.graph.cost import cost

    before, after = cost(original), cost(program)
    content = {
        "version": environment["graphwright"],
        "model": {
            "source": str(source.source),
            "sha256": source.sha256,
            "parameters": before.parameters,
            "weight_bytes": before.weight_bytes,
            "macs": before.macs,
            "macs_formula": before.formula,
            "sizes": before.sizes,
        },
        "passes": passes,
        "result": {
            "parameters": after.parameters,
            "weight_bytes": after.weight_bytes,
            "macs": after.macs,
            "macs_formula": after.formula,
            "artifacts": artifacts,
        },
        "fidelity": fidelity.as_dict(),
        "evaluation": evaluation,
        "latency": latency,
        "layers": _layers(original, program, before, after),
        "notes": notes,
        "require": require,
        "warnings": [*warnings, *before.notes],
        "code": list(code),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes,
        "versions": _versions(),
        "machine": {**machine(), "threads": environment["threads"]},
    }
    return dict(Report.model_validate(_finite(content)).model_dump(mode="json"))


def _layers(original: Program, program: Program, before: Any, after: Any) -> list[dict[str, Any]]:
    from graphwright.ir.check.layer_errors import layer_errors

    errors = {}
    names = [[spec.name for spec in p.signature.outputs] for p in (original, program)]
    if names[0] == names[1]:
        # where a pass has restated the program, its layers see other inputs
        errors = {e.node: e.error for e in layer_errors(original, program, counted=before)}
    left = {layer.node: layer for layer in after.layers}
    rows = []
    for layer in before.layers:
        error, now = errors.get(layer.node), left.get(layer.node)
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "node": layer.node,
                "macs": layer.macs,
                "parameters": layer.parameters,
                "weight_bytes": layer.weight_bytes,
                "weight_bytes_after": None if now is None else now.weight_bytes,
                "relative": None if error is None else error.relative,
            }
        )
    return rows


def write_report(report: dict[str, Any], program: Program | Parts, folder: str | Path) -> None:
    """Writes `report.json` and `report.html` into `folder`, each by renaming a finished file.

    The page shows the graph of the program, of several parts that of the last one.
    """
    from graphwright.report.page import render_page

    if isinstance(program, Mapping):
        program = list(program.values())[-1]
    folder = Path(folder)
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    page = render_page(report, program)
    for name, content in (("report.json", text + "\n"), ("report.html", page)):
        write_atomically(folder / name, content.encode("utf-8", "backslashreplace"))


def machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def _finite(value: Any) -> Any:
    """The same content with floats that JSON cannot hold made None, and plain keys."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# --- console -----------------------------------------------------------------------------------


def print_summary(
    report: dict[str, Any], folder: str | Path, console: Console | None = None
) -> None:
    """A run's figures on the console, and where the result lies."""
    from rich.console import Console
    from rich.table import Table

    from graphwright.report.charts import error_text, size_text, time_text

    console = console or Console()
    if report["passes"]:
        chain = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("pass", "contract"):
            chain.add_column(title)
        for title in ("changed", "time", "error"):
            chain.add_column(title, justify="right")
        for row in report["passes"]:
            chain.add_row(
                _named(row, row["id"]), row["contract"], str(changed_layers(row)),
                time_text(row["seconds"]), error_text(row["error"]),
            )  # fmt: skip
        console.print(chain)
        console.print()
    for name, text in summary_lines(report):
        console.print(f"{name:<11}{text}", markup=False, highlight=False, soft_wrap=True)
    for artifact in report["result"]["artifacts"]:
        text = f"{Path(folder) / artifact['path']} ({size_text(artifact['file_bytes'])})"
        console.print(f"{'artifact':<11}{text}", markup=False, highlight=False, soft_wrap=True)
    place = Path(folder) / "report.html"
    console.print(f"{'report':<11}{place}", markup=False, highlight=False, soft_wrap=True)


def summary_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) of a run: weights, fidelity, evaluation, latency, warnings."""
    from graphwright.report.charts import count_text, metric_text, size_text

    before, after = report["model"], report["result"]
    weights = f"{size_text(before['weight_bytes'])} -> {size_text(after['weight_bytes'])}"
    parameters = f"{count_text(before['parameters'])} -> {count_text(after['parameters'])}"
    lines = [
        ("weights", f"{weights}, parameters {parameters}"),
        *_fidelity_lines(report),
        *_decode_lines(report),
    ]
    if report["evaluation"]:
        row = report["evaluation"]
        exact = {"before": row["metric"] == "snr_db", "after": row.get("exact", False)}
        shown = [metric_text(row[k], exact=exact[k]) for k in ("before", "after")]
        lines.append((row["metric"].rpartition(":")[2][:10], f"{shown[0]} -> {shown[1]}"))
    for row in report["latency"]:
        text = (
            f"{row['before_ms']:.2f} ms -> {row['after_ms']:.2f} ms, {row['speedup']:.2f}x "
            f"({_named(row, row['backend'])}, {row['device']}, {row['threads']} threads)"
        )
        lines.append(("latency", text))
    lines += _estimate_lines(report)
    if report.get("search"):
        lines.append(("search", report["search"]["why"]))
    lines += [("warning", text) for text in report["warnings"]]
    lines += [("ran code", text) for text in report["code"]]
    for row in report["require"]:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
        state = "met" if row["met"] else "MISSED"
        lines.append(("require", f"{row['name']} {row['bound']:g}: {measured}, {state}"))
    return lines


def _fidelity_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """One line, or one for each artifact where there are several."""
    from graphwright.report.charts import error_text

    rows = [row for row in report["result"]["artifacts"] if row.get("fidelity")]
    if len(rows) < 2:
        return [("fidelity", error_text(report["fidelity"]))]
    return [
        ("fidelity", f"{error_text(row['fidelity'])} ({_named(row, row['backend'])})")
        for row in rows
    ]


def _estimate_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The stages with an estimate, all together."""
    from graphwright.report.charts import size_text, time_text

    rows = [row for row in report.get("stages", []) if row["estimated"]]
    if not rows:
        return []
    took = sum(row["seconds"] for row in rows)
    told = sum(row["estimated"]["seconds"] for row in rows)
    peak = max(row["peak_rss_bytes"] for row in rows)
    high = max(row["estimated"]["peak_rss_bytes"] for row in rows)
    return [("estimated", f"{time_text(told)} (it took {time_text(took)}), "
                          f"{size_text(high)} of memory (it was {size_text(peak)})")]  # fmt: skip


def _named(row: dict[str, Any], what: str) -> str:
    """With the part of the model in front, where it has several."""
    return f"{row['part']}: {what}" if row.get("part") else what


def _decode_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [row for row in report["result"]["artifacts"] if row.get("decode") is not None]
    return [
        ("decode", f"{row['decode']:.2g} token by token against at once ({row['backend']})")
        for row in rows
    ]


def changed_layers(row: dict[str, Any]) -> int:
    """Layers that a pass did something to."""
    return sum(1 for *_, changed in row["actions"] if changed)
