"""Opens the files of the toolbox commands: a model file, a saved program, or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.backends.base import Compiled
    from graphwright.ir.program import Program
    from graphwright.specs.sections import ModelSection

SEED = 0
"""Of example inputs and synthetic data of the toolbox commands."""


def open_program(source: str | Path, *, spec: str | None, allow_pickle: bool) -> Program:
    """A model file or saved program, traced with the inputs that a spec's `model` section says.

    Raises:
        ModelError: it cannot be opened or traced.
        SpecError: the spec is wrong.
    """
    from graphwright.ir.files import load_model
    from graphwright.job.build import build_program

    section = _model_section(spec)
    loaded = load_model(source, section=section, allow_pickle=allow_pickle)
    return build_program(loaded, section, SEED)


def open_runnable(
    source: str | Path, *, spec: str | None, allow_pickle: bool
) -> Program | Compiled:
    """An artifact that a backend saved, or else what `open_program` opens."""
    from graphwright.backends.opening import open_artifact

    found: Compiled | None = open_artifact(Path(source)) if Path(source).exists() else None
    return found or open_program(source, spec=spec, allow_pickle=allow_pickle)


def probable_sizes(runnable: Any) -> dict[str, int]:
    """A size for every dynamic dimension: of the examples, or 2 for the first axis and 16."""
    from graphwright.ir.data.batches import example_sizes
    from graphwright.ir.signature import DimRange

    signature = runnable.signature
    examples = getattr(runnable, "examples", None)
    if examples is not None:
        return example_sizes(signature, examples)
    leading = {spec.shape[0] for spec in signature.inputs if spec.shape}
    sizes = {}
    for dim in {d: None for spec in signature.inputs for d in spec.shape if isinstance(d, str)}:
        bounds = signature.dims.get(dim, DimRange())
        size = max(bounds.min, 2 if dim in leading else 16)
        sizes[dim] = size if bounds.max is None else min(size, bounds.max)
    completed: dict[str, int] = signature.completed(sizes)
    return completed


def _model_section(spec: str | None) -> ModelSection:
    if spec is None:
        from graphwright.specs.sections import ModelSection

        return ModelSection()
    from graphwright.specs.spec import load_spec

    return load_spec(spec).model
