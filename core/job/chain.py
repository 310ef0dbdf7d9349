"""The chain of passes: each one run, timed, checked against its contract, and kept for a resume."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ContractError, GraphwrightError
from graphwright.ir.lack import lack
from graphwright.job.data import write_made
from graphwright.job.keys import chain_keys
from graphwright.job.run import clock

if TYPE_CHECKING:
    from graphwright.ir.check.verify import Checker
    from graphwright.ir.context import Context
    from graphwright.ir.data.batches import Batches
    from graphwright.ir.program import Program
    from graphwright.job.run import Run
    from graphwright.passes.base import Pass, Result

CHECK_BATCHES = 2
"""Calibration batches that every pass is checked on, beside the example inputs."""


def run_chain(
    run: Run, original: Program, calibration: Batches | None, training: Batches | None = None
) -> tuple[Program, list[dict[str, Any]], Checker]:
    """Runs the spec's passes; goes on after the last one that an earlier run has finished.

    Returns:
        The program after all passes, one report row per pass, and the checker that compared
        every program with the one before it.

    Raises:
        ContractError: a pass broke its contract; a reproducer is left beside the output folder.
    """
    from graphwright.ir.graph.digest import digest
    from graphwright.passes.base import find_pass

    keys = chain_keys(run, digest(original), calibration, training)
    records: list[dict[str, Any]] = []
    program, begin, uncompressed = original, 0, original
    checkpoints = run.checkpoints
    with run.stage("first run"):
        checker = _checker(run, original, calibration)
    if not run.settings.resume:
        run.place.drop_pass_work()
    found = checkpoints.load(keys, run.warn) if run.settings.resume else None
    if found is not None:
        index, program, records, kept = found
        begin, uncompressed = index + 1, original if kept is None else kept
        done = run.spec.passes[:begin]
        checker.resume(program, [find_pass(c.id)(**c.options).promise() for c in done])
        for text in (text for record in records for text in record["warnings"]):
            run.warn(text)
        run.progress.note(f"resumed after pass {index} ({run.spec.passes[index].id})")
    data = {"calibration": calibration, "training": training, "teacher": original}
    unsaved = 0.0
    for index in range(begin, len(run.spec.passes)):
        context = _context(run, index).replace(key=keys[index], uncompressed=uncompressed, **data)
        program, uncompressed, record = _one_pass(run, index, program, checker, context)
        records.append(record)
        unsaved += record["seconds"]
        if unsaved >= run.settings.checkpoint_seconds and run.place.is_main:
            kept = None if uncompressed is original else uncompressed
            try:
                checkpoints.save(index, keys[index], program, records, kept)
                run.place.drop_pass_work()  # what a pass had saved on its way is of no more use
            except (GraphwrightError, OSError) as error:
                # The run is what was asked for; a checkpoint only saves time if it is killed.
                told = lack(error) or error
                run.warn(f"no checkpoint behind pass {index} ({record['id']}): {told}")
            unsaved = 0.0
        run.check_time(f"pass {index} ({record['id']})")
    return program, records, checker


def _checker(run: Run, program: Program, calibration: Batches | None) -> Checker:
    """Measures on real inputs where there are any; checks at other sizes in any case."""
    from graphwright.ir.check.verify import Checker
    from graphwright.ir.data.synthetic import other_size_inputs

    batches: list[Any] = list(itertools.islice(calibration or (), CHECK_BATCHES))
    if not program.signature.dims:
        return Checker(program, batches)
    others = other_size_inputs(program, run.spec.seed)
    if not others and not any(_is_of_another_size(program, batch) for batch in batches):
        run.warn("passes were checked at the example sizes only")
    return Checker(program, batches or others, others if batches else ())


def _is_of_another_size(program: Program, batch: Any) -> bool:
    """Whether every dynamic dimension of a batch has another size than in the examples."""
    from graphwright.ir.data.synthetic import example_sizes

    here = example_sizes(program.signature, program.examples)
    sizes = example_sizes(program.signature, program.bind(**batch))
    return all(sizes[dim] != size for dim, size in here.items())


def _context(run: Run, index: int) -> Context:
    """Surroundings of a pass; the data is still to be added."""
    import torch

    from graphwright.ir.context import Context

    return Context(
        seed=run.spec.seed,
        device=torch.device(run.settings.device),
        jobs=run.settings.jobs,
        work=run.place.pass_work(index),
        progress=run.progress.update,
        warn=run.warn,
        scope=(index, run.spec.passes[index].id),
        folder=Path(run.spec.folder),
        checkpoint_seconds=run.settings.checkpoint_seconds,
    )


def _one_pass(
    run: Run, index: int, program: Program, checker: Checker, context: Context
) -> tuple[Program, Program, dict[str, Any]]:
    """The program behind the pass, the uncompressed one (`uncompressed.follow`), and the record."""
    from graphwright.ir.files.mapped import new_tensors_mapped
    from graphwright.job.uncompressed import follow
    from graphwright.passes.base import find_pass

    call = run.spec.passes[index]
    step = find_pass(call.id)(**call.options)
    run.note_peak()
    begin = clock()
    with run.progress.stage(call.id):
        result, skipped = _executed(run, step, program, context)
        result = replace(result, program=new_tensors_mapped(program, result.program))
        peak, behind = run.note_peak(), clock()
        run.note_stage(f"{index} {call.id}", begin, peak)
        try:
            error = checker.accept(result.program, step.promise())
        except ContractError as failure:
            raise _with_reproducer(run, failure, program, index, context) from failure
    run.note_stage(f"{index} check", behind, run.note_peak())
    said = [f"{call.id}: {text}" for text in result.warnings]
    for text in said:
        run.warn(text)
    record = {
        "id": call.id,
        "options": step.resolved_options(),
        "contract": step.contract,
        "seconds": behind[0] - begin[0],
        "peak_rss_bytes": peak,
        "error": error.as_dict(),
        "decode": checker.decode_error,
        "actions": [[a.layer, a.what, a.reason, a.changed] for a in result.actions],
        "metrics": dict(result.metrics),
        "warnings": said,
        "skipped": skipped,
    }
    assert context.uncompressed is not None
    return result.program, follow(context.uncompressed, step, program, result), record


def _executed(run: Run, step: Pass[Any], program: Program, context: Context) -> tuple[Result, str]:
    """What the pass made, and why it made nothing: its layers are all in other parts of a model."""
    from graphwright.ir.layers.selectors import NoLayerError
    from graphwright.passes.base import Result

    try:
        return step.execute(program, context), ""
    except NoLayerError as nothing:
        if not run.part:
            raise
        return Result(program), nothing.message


def _with_reproducer(
    run: Run, failure: ContractError, program: Program, index: int, context: Context
) -> ContractError:
    """The same failure, with the program before the pass and a spec of that pass on disk."""
    from graphwright.specs.emit import to_yaml

    call = run.spec.passes[index]
    folder = run.place.out.with_name(f"{run.place.out.name}.reproducer")
    document: dict[str, Any] = {"version": 1, "seed": run.spec.seed}
    for name, given in (("calibration", run.spec.calibration), ("training", run.spec.training)):
        if given is not None:
            section = given.model_dump(mode="json", exclude_none=True)
            data = Path(run.spec.folder) / section.get("data", "")
            is_file = "data" in section and data.exists()
            document[name] = {**section, "data": str(data.absolute())} if is_file else section
    document["lock"] = {"behind": [done.id for done in program.provenance]}
    document["passes"] = [{call.id: call.options} if call.options else call.id]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        program.save(folder / "before.pt2")
        for name in ("calibration", "training"):
            write_made(document.get(name, {}), getattr(context, name), folder, name)
        (folder / "spec.yaml").write_text(to_yaml(document), encoding="utf-8")
    except (GraphwrightError, OSError) as error:
        lost = f"no reproducer: {error}"
        where = f"passes[{index}] (line {call.line})"
        return ContractError(failure.message, where=where, details=(*failure.details, lost))
    return ContractError(
        failure.message,
        where=f"passes[{index}] (line {call.line})",
        fix=f"Reproduce it: optimize {folder}/before.pt2 --spec {folder}/spec.yaml",
        details=failure.details,
    )
