"""`optimize --plan`: opens and traces the model, and estimates the rest without running it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError, ResourceError
from graphwright.ir.lack import lacks_told
from graphwright.ir.parts import Parts
from graphwright.ir.user_code import watched
from graphwright.plan.estimate import Step
from graphwright.plan.stages import is_made, planned
from graphwright.specs.code import refuse_code

if TYPE_CHECKING:
    from rich.console import Console

    from graphwright.ir.program import Program
    from graphwright.job.run import JobSettings
    from graphwright.plan.rates import Rates
    from graphwright.specs.search import SearchSection
    from graphwright.specs.spec import Spec


def plan(
    source: str | Path, spec: Spec, settings: JobSettings, console: Console | None = None
) -> list[Step]:
    """Prints what a run will take. Nothing is written but the rates in the cache folder.

    Args:
        source, spec, settings: as of a run.
        console: where to print; stdout when None.

    Raises:
        ResourceError: something will not fit; the table is printed first.
        GraphwrightError: what a run would raise before its first pass.
    """
    from rich.console import Console

    from graphwright.job.memory import resident_bytes
    from graphwright.job.place import OutputPlace
    from graphwright.job.progress import Progress
    from graphwright.job.rules import check_rules
    from graphwright.job.run import Run
    from graphwright.job.stages import Job
    from graphwright.plan.fits import available_memory, beyond_bounds, free_disk, lacking
    from graphwright.plan.rates import measured_rates
    from graphwright.plan.table import print_plan

    if settings.no_code:
        refuse_code(spec)
    check_rules(spec)
    place = OutputPlace(Path(settings.out))
    place.check()
    progress = Progress(quiet=settings.quiet)
    with lacks_told(), progress, watched(no_code=settings.no_code, say=progress.note) as door:
        run = Run(spec, settings, place, progress, time.monotonic(), code=door.ran)
        found = measured_rates(settings.device, progress.note)
        if found is None:
            raise ResourceError("the speed of this machine could not be measured")
        run.started = time.monotonic()
        steps = _steps(Job(run), source, found)
    console = console or Console()
    print_plan(run.stages, steps, console)
    if spec.search is not None:
        console.print(candidates_text(spec.search))
    memory, disk = available_memory(), free_disk(place.work)
    missing = lacking(steps, held=resident_bytes(), memory=memory, disk=disk, out=place.out)
    missing += beyond_bounds(steps, run.seconds(), spec.require)
    if missing:
        raise ResourceError(
            f"this will not fit: {'; '.join(missing)}",
            fix="Take smaller batches, fewer samples or fewer jobs, or a machine with more.",
        )
    return steps


def candidates_text(section: SearchSection) -> str:
    """How often a search runs what a plan is of."""
    most = f", {section.trials} of them at most" if section.trials is not None else ""
    return (f"This is one run of the spec as it is written. The search runs one for every "
            f"candidate{most}, and then the winner's.")  # fmt: skip


def _steps(job: Any, source: str | Path, found: Rates) -> list[Step]:
    """The stages of every part of the model, one part behind the other."""
    from graphwright.job.diffusion import is_diffusion
    from graphwright.job.multipart import check_sections, refuse_parts, spec_of
    from graphwright.job.stages import Job

    if is_diffusion(source):
        raise ArgumentError(
            "a folder of diffusers cannot be planned as a whole",
            where=str(source),
            fix="Plan its networks one by one, each by the path of its own folder.",
        )
    loaded = job.load(source)
    traced = job.trace(loaded)
    if not isinstance(traced, Parts):
        refuse_parts(job.spec)
        return _of_program(job, loaded, traced, found)
    check_sections(job.spec, traced)
    steps: list[Step] = []
    for name, program in traced.items():
        part = Job(job.run.of_part(name, spec_of(job.spec, traced, name)), traced)
        steps += _of_program(part, loaded, program, found)
    return steps


def _of_program(job: Any, loaded: Any, program: Program, found: Rates) -> list[Step]:
    """Estimates one program; data that takes work to make is not made for that."""
    from graphwright.job.data import all_data, check_made

    job.exports(program)
    made = {name: None for name in ("calibration", "training") if is_made(job.spec, name)}
    check_made(job.spec, program, several=job.parts is not None)
    job.run.spec = replace(job.spec, **made)
    data = all_data(job.run, program, loaded.tokenizer, job.parts)
    job.run.spec = job.spec
    return planned(job.run, program, data, found)
