"""The job on the folder of a whole diffusers pipeline: its networks are the parts of one result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from graphwright.job.rules import dtype_refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from graphwright.ir.files import LoadedModel
    from graphwright.ir.parts import Parts
    from graphwright.ir.pipeline.folder import LoadedPipeline
    from graphwright.ir.program import Program
    from graphwright.job.multipart import BuiltParts, Outcome
    from graphwright.job.run import Run


def is_diffusion(source: str | Path) -> bool:
    """Whether a path is such a folder."""
    from graphwright.ir.pipeline.folder import is_pipeline

    return is_pipeline(source)


def build_diffusion(
    run: Run, source: str | Path, build: Callable[[Run, Parts, LoadedModel, Program], Outcome]
) -> tuple[BuiltParts, LoadedModel]:
    """All parts with the report of the whole, and the pipeline as it is named there.

    Args:
        run: of the whole.
        source: the folder.
        build: the stages of a run on one program.

    Raises:
        ModelError: a network is missing, or of a class that is not known to us.
        ArgumentError: the spec names a part that the pipeline has not, or has a section that has
            no meaning for several programs.
    """
    from graphwright.ir.pipeline.folder import load_pipeline
    from graphwright.job.multipart import build_parts

    _refuse_inputs(run)
    with run.progress.stage("load"):
        loaded = load_pipeline(
            source, tuple(run.spec.parts), refusal=dtype_refusal(run.spec), section=run.spec.model
        )
    for text in loaded.warnings:
        run.warn(text)
    parts = _traced(run, loaded)
    built = build_parts(
        run, parts, lambda r, program: build(r, parts, loaded.parts[r.part], program)
    )
    return built, loaded.whole()


def _refuse_inputs(run: Run) -> None:
    from graphwright.ir.errors import ArgumentError

    said = run.spec.model.model_dump(exclude_defaults=True, exclude={"dtype"})
    if said:
        raise ArgumentError(
            "the networks of a pipeline say themselves what they take",
            where=f"model.{next(iter(said))}",
            fix="Leave that out.",
        )


def _traced(run: Run, loaded: LoadedPipeline) -> Parts:
    from graphwright.ir.pipeline.folder import trace_pipeline
    from graphwright.ir.trace.capture import TraceWarning

    with run.progress.stage("trace"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TraceWarning)
        parts = trace_pipeline(loaded, run.spec.seed)
    for warning in caught:
        if issubclass(warning.category, TraceWarning):
            run.warn(str(warning.message))
    return parts
