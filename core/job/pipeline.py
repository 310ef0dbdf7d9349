"""The main job: one run, or the search of a spec, in an output folder that is its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.lack import lacks_told
from graphwright.job.environment import deterministic
from graphwright.job.place import OutputPlace
from graphwright.job.rules import check_rules
from graphwright.job.run import JobSettings
from graphwright.job.stages import Outcome, compiled
from graphwright.specs.code import refuse_code

if TYPE_CHECKING:
    from graphwright.specs.spec import Spec

__all__ = ["JobSettings", "Outcome", "run"]


def run(source: str | Path, spec: Spec, settings: JobSettings) -> Outcome:
    """Compiles `source` by `spec` and writes artifacts, report and lock file under `settings.out`.

    A spec with a section `search` is compiled as its best candidate.

    Raises:
        GraphwrightError: with the exit status that says which stage failed.
    """
    if settings.no_code:
        refuse_code(spec)
    check_rules(spec)
    place = OutputPlace(Path(settings.out))
    with lacks_told(), place.locked(), deterministic():
        if spec.search is None:
            outcome = compiled(source, spec, settings, place)
        else:
            from graphwright.search.search import searched

            outcome = searched(source, spec, settings, place)
    if not settings.quiet and place.is_main:
        from graphwright.report.build import print_summary

        print_summary(outcome.report, outcome.folder)
    return outcome


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a finished run."""
    found: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    return found
