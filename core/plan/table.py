"""Tables of a plan on the console, and beside what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphwright.plan.estimate import Step, total
from graphwright.report.charts import size_text, time_text

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(
    measured: Sequence[Mapping[str, Any]], steps: Sequence[Step], console: Console
) -> None:
    """The stages of a plan.

    Args:
        measured: stages that ran to make it: loading, tracing, reading data.
        steps: estimated.
        console: where to print.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    for title in ("time", "peak memory", "disk, at most"):
        table.add_column(title, justify="right")
    table.add_column("")
    for row in measured:
        table.add_row(Text(row["name"]), time_text(row["seconds"]),
                      size_text(row["peak_rss_bytes"]), "", "measured")  # fmt: skip
    for step in steps:
        name = f"{step.part}: {step.name}" if step.part else step.name
        disk_text = size_text(step.disk_bytes) if step.disk_bytes else ""
        table.add_row(Text(name), time_text(step.seconds), size_text(step.peak_rss_bytes),
                      disk_text, "estimated")  # fmt: skip
    took, peak, disk = total(steps)
    spent = sum(row["seconds"] for row in measured)
    table.add_row("whole run", time_text(took + spent), size_text(peak), size_text(disk), "")
    console.print(table)


def compared(
    report: dict[str, Any], steps: Sequence[Step], stages: Sequence[Mapping[str, Any]]
) -> None:
    """Puts what was estimated beside what happened: `stages` of a report, and each of its passes.

    Args:
        report: contents of `report.json`; changed.
        steps: estimated, of one program.
        stages: as a run notes them.
    """
    told = {
        step.name: {
            "seconds": step.seconds,
            "peak_rss_bytes": step.peak_rss_bytes,
            "disk_bytes": step.disk_bytes,
        }
        for step in steps
    }
    report["stages"] = [
        {"part": "", **stage, "estimated": told.get(stage["name"])} for stage in stages
    ]
    for index, row in enumerate(report["passes"]):
        row["estimated"] = told.get(f"{index} {row['id']}")
