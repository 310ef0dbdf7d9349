"""The job on a model of several parts: a chain on each, one folder, one report.

Parts that the spec names have a chain of their own; all others share that of the spec. There a pass
acts on every part that has layers for it; selectors are names of layers, which tell the
parts apart. A selector that matches no layer of any part is an error, as in a single program.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import matching
from graphwright.ir.parts import Parts

if TYPE_CHECKING:
    from graphwright.backends.base import Compiled
    from graphwright.ir.program import Program
    from graphwright.job.run import Run
    from graphwright.specs.spec import PassCall, Spec

TARGETS = "targets"
"""Option of passes that selects layers."""

ONE_PROGRAM = ("evaluate", "training", "export")
"""Sections that have no meaning yet for a model of several programs."""


class Outcome(Protocol):
    """What `build` gives: `pipeline.Outcome` of one program."""

    report: dict[str, Any]
    program: Program | Parts
    compiled: dict[str, Compiled]


@dataclass(frozen=True)
class BuiltParts:
    """What became of the parts: see `Outcome`."""

    programs: Parts
    compiled: dict[str, Compiled]
    report: dict[str, Any]


def build_parts(run: Run, parts: Parts, build: Callable[[Run, Program], Outcome]) -> BuiltParts:
    """All parts, with the report of the whole; the files of the report are still to be written.

    Args:
        run: of the whole.
        parts: as traced.
        build: the stages of a run on one program.

    Raises:
        ArgumentError: a section has no meaning for several programs.
        ModelError: a pass has nothing to do in any part.
    """
    check_sections(run.spec, parts)
    for name in run.spec.parts:
        if name not in parts:
            raise ArgumentError(f"the model has no part {name!r}, but {', '.join(parts)}",
                                where=f"parts.{name}")  # fmt: skip
    if run.place.is_main:
        run.place.fresh_staging()
    built: dict[str, Outcome] = {}
    for name, program in parts.items():
        part = run.of_part(name, spec_of(run.spec, parts, name))
        built[name] = build(part, program)
        run.peak = max(run.peak, part.peak)
    programs = Parts({name: cast("Program", outcome.program) for name, outcome in built.items()})
    compiled = {
        f"{name}.{backend}": lowered
        for name, outcome in built.items()
        for backend, lowered in outcome.compiled.items()
    }
    if not run.place.is_main:
        return BuiltParts(programs, compiled, {})
    reports = {name: outcome.report for name, outcome in built.items()}
    _refuse_idle_passes({n: r for n, r in reports.items() if n not in run.spec.parts}, "")
    for name in run.spec.parts:
        _refuse_idle_passes({name: reports[name]}, f"parts.{name}.")
    report = _report(run, reports, compiled)
    _write_files(run, programs)
    return BuiltParts(programs, compiled, report)


def check_sections(spec: Spec, parts: Parts) -> None:
    """Raises ArgumentError where a section has no meaning for several programs."""
    for name in ONE_PROGRAM:
        if getattr(spec, name):
            raise ArgumentError(
                f"the model is compiled as {len(parts)} programs ({', '.join(parts)}), and "
                f"`{name}` is for one",
                where=name,
                fix="Leave the section out.",
            )


def refuse_parts(spec: Spec) -> None:
    """Refuses chains of parts for a model that has none.

    Raises:
        ArgumentError: the spec has some.
    """
    if spec.parts:
        raise ArgumentError(
            "the model is one program, and has no parts",
            where=f"parts.{next(iter(spec.parts))}",
            fix="Put its passes into `passes`.",
        )


def spec_of(spec: Spec, parts: Parts, name: str) -> Spec:
    """The spec of one part: selectors of other parts' layers out, bounds left to the whole.

    A part with a chain of its own has that one as it is.
    """
    if name in spec.parts:
        return replace(spec.parts[name], require=type(spec.require)())
    passes = tuple(_call_of(call, parts, name) for call in spec.passes)
    return replace(spec, passes=passes, require=type(spec.require)())


def _call_of(call: PassCall, parts: Parts, name: str) -> PassCall:
    targets = call.options.get(TARGETS)
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        return call
    known = {part: set(matching(program, targets)) for part, program in parts.items()}
    elsewhere = set().union(*known.values()) - known[name]
    own = [each for each in targets if each not in elsewhere]
    if not any(not each.startswith("!") for each in own):
        return call  # it selects nothing here, and is skipped
    return replace(call, options={**call.options, TARGETS: own})


def _refuse_idle_passes(reports: dict[str, dict[str, Any]], place: str) -> None:
    """Refuses a pass that did nothing in any of the parts that share a chain."""
    for index, rows in enumerate(zip(*(r["passes"] for r in reports.values()), strict=True)):
        if all(row["skipped"] for row in rows):
            raise ModelError(rows[0]["skipped"], where=f"{place}passes[{index}] ({rows[0]['id']})")


def _report(
    run: Run, reports: dict[str, dict[str, Any]], compiled: dict[str, Any]
) -> dict[str, Any]:
    from graphwright.job.require import check_bounds
    from graphwright.report.parts import joined

    whole = joined(reports)
    loading = [{"part": "", "estimated": None, **stage} for stage in run.stages]
    whole["stages"] = [*loading, *whole["stages"]]
    whole["warnings"] = list(dict.fromkeys([*run.warnings, *whole["warnings"]]))
    seconds = run.seconds()
    bounds = check_bounds(
        run.spec.require,
        evaluation=None,
        cosine=whole["fidelity"]["cosine"],
        latency=whole["latency"],
        artifacts=whole["result"]["artifacts"],
        peak_rss_bytes=run.peak,
        seconds=seconds,
        notes={name: lowered.notes for name, lowered in compiled.items()},
    )
    return {**whole, "require": [bound.to_json() for bound in bounds], "seconds": seconds,
            "peak_rss_bytes": run.peak}  # fmt: skip


def _write_files(run: Run, programs: Parts) -> None:
    """What belongs to the whole: which parts there are, and the tokenizer."""
    from graphwright.ir.generation.folder import write_text_files
    from graphwright.ir.generation.record import Generation
    from graphwright.ir.parts import INDEX

    staging = run.place.staging
    index = {"version": 1, "parts": list(programs)}
    (staging / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    records = [r for p in programs.values() if (r := Generation.of(p)) is not None]
    if records:
        folder = records[-1].tokenizer
        given = None if folder is None else Path(folder)
        _, notes = write_text_files(given, staging, records[-1].context_length)
        for text in notes:
            run.warn(text)
