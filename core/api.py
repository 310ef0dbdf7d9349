"""The public functions that drive the parts: load, lower, optimize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.backends.base import Compiled
    from graphwright.backends.parts import CompiledParts
    from graphwright.ir.program import Program
    from graphwright.job.pipeline import Outcome


def load(path: str | Path) -> Program | Compiled | CompiledParts:
    """Opens a saved program, an artifact that a backend saved, or a folder with one per part.

    Raises:
        ModelError: there is no such file, it is neither, or it is damaged.
    """
    from graphwright.backends.opening import open_artifact
    from graphwright.backends.parts import open_parts
    from graphwright.ir.errors import ModelError
    from graphwright.ir.files.archive import load_program

    if not Path(path).exists():
        raise ModelError("no such file or folder", where=str(path))
    if (parts := open_parts(Path(path))) is not None:
        return parts
    compiled = open_artifact(Path(path))
    return load_program(path) if compiled is None else compiled


def lower(program: Program, backend: str, *, seed: int = 0, **options: Any) -> Compiled:
    """Lowers a program; the result is checked against it before it is handed over.

    A denoiser (`sample.denoiser`) becomes a bundle that samples.

    Args:
        program: left as it is.
        backend: `onnxruntime` or `triton`.
        seed: of the inputs that the check draws.
        options: the backend's options, as in a spec's `lower` section.

    Raises:
        LoweringError: it cannot be lowered, or the result differs from the program.
        ArgumentError: there is no such backend or option.
    """
    from graphwright.backends.bundle import lower_program
    from graphwright.ir.context import Context

    return lower_program(program, backend, options, Context(seed=seed, scope=("lower", backend)))


def optimize(
    model: str | Path,
    spec: str | Path,
    *,
    out: str | Path = "out",
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Outcome:
    """The main job, as the command line does it.

    Args:
        model: model file or folder.
        spec: YAML file, or name of a ready-made spec.
        out: folder for the results.
        overrides: `KEY=VALUE` strings, as `passes.1.sparsity=0.5`.
        settings: further fields of `graphwright.job.pipeline.JobSettings`.

    Raises:
        GraphwrightError: with the exit status of the stage that failed.
    """
    from graphwright.job.pipeline import JobSettings, run
    from graphwright.specs.spec import load_spec

    loaded = load_spec(str(spec), list(overrides))
    return run(model, loaded, JobSettings(out=out, quiet=settings.pop("quiet", True), **settings))
