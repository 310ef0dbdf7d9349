"""Takes one architecture through the whole compiler; says how far each stage is from the model."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from conformance.zoo import Architecture
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import GraphwrightError
from graphwright.ir.files.archive import load_program
from graphwright.ir.trace.dims import is_free

TOLERANCE = 1e-4
"""Largest ||a - b|| / ||a|| of any output, in float32 at every size."""
CLEANUP = (
    "cleanup.canonicalize",
    "cleanup.remove_identities",
    "cleanup.fold_constants",
    "cleanup.eliminate_common_subexpressions",
    "cleanup.fold_batch_norm",
    "cleanup.merge_linear",
)
STAGES = ("trace", "cleanup", "saved", "onnxruntime", "triton")
CACHES = ("past_key_values", "cache_params", "state", "rnn_state")
"""Outputs that hold the model's key-value or recurrent cache; tracing turns caches off."""


@dataclass
class Row:
    """What became of one architecture: per stage `ok` or what went wrong."""

    name: str
    family: str
    stages: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    """Largest relative error of any output, stage and size that passed."""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(self.stages.get(stage) == "ok" for stage in STAGES)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _DiffersError(Exception):
    """A stage ran, and computes something else than the model."""


def judge(architecture: Architecture, stages: tuple[str, ...] = STAGES) -> Row:
    """Runs the stages in order; one that fails does not stop the backends that can do without."""
    row = Row(architecture.name, architecture.family)
    model = architecture.build()
    sizes = ({}, *architecture.checks)
    expected = [_reference(model, architecture, chosen) for chosen in sizes]
    made: dict[str, Any] = {}

    def attempt(stage: str, make: Callable[[], Any]) -> None:
        if stage not in stages:
            return
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made[stage] = make()
            row.notes += [str(w.message) for w in caught if _is_trace_warning(w)]
            if hasattr(made[stage], "graph"):
                _expect_free(made[stage])
            row.error = max(row.error, _compare(made[stage], architecture, sizes, expected))
            row.stages[stage] = "ok"
        except (_DiffersError, GraphwrightError) as error:
            row.stages[stage] = str(error).splitlines()[0][:300]
        except Exception as error:
            row.stages[stage] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row.seconds[stage] = round(time.perf_counter() - start, 2)

    attempt("trace", lambda: _trace(model, architecture))
    if "trace" not in made:
        return row
    attempt("cleanup", lambda: _clean(made["trace"]))
    program = made.get("cleanup", made["trace"])
    attempt("saved", lambda: _reloaded(program))
    attempt("onnxruntime", lambda: gw.lower(program, "onnxruntime"))
    attempt("triton", lambda: gw.lower(program, "triton"))
    return row


def _is_trace_warning(caught: warnings.WarningMessage) -> bool:
    return caught.category.__name__ == "TraceWarning"


def _trace(model: torch.nn.Module, architecture: Architecture) -> Any:
    examples = {**architecture.inputs(), **architecture.constants}
    return gw.trace(model, examples, dynamic=architecture.dynamic)


def _expect_free(program: Any) -> None:
    """Every dimension asked to be free still is, in the recorded shapes too."""
    for node, spec in zip(
        program.graph.find_nodes(op="placeholder"), program.signature.inputs, strict=True
    ):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(dim, str) and not is_free(size):
                raise _DiffersError(f"dimension {dim!r} of {spec.name!r} became {size}")


def _clean(program: Any) -> Any:
    from graphwright.passes.registry import find_pass

    for name in CLEANUP:
        program = find_pass(name)()(program)
    return program


def _reloaded(program: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        program.save(path)
        return load_program(path)


@torch.no_grad()
def _reference(model: torch.nn.Module, architecture: Architecture, sizes: Any) -> dict[str, Tensor]:
    output = model(**architecture.inputs(**sizes), **architecture.constants)
    return dict(_leaves(output))


@torch.no_grad()
def _compare(run: Any, architecture: Architecture, sizes: Any, expected: Any) -> float:
    """Largest relative error over all sizes and outputs."""
    worst = 0.0
    for chosen, reference in zip(sizes, expected, strict=True):
        actual = dict(_leaves(run(**architecture.inputs(**chosen))))
        missing = [n for n in reference if n not in actual and not n.startswith(CACHES)]
        if missing or not actual:
            raise _DiffersError(f"at {dict(chosen)}: no output {missing}")
        for name, value in actual.items():
            error = _relative(reference[name], value, f"output {name!r} at {dict(chosen)}")
            worst = max(worst, error)
    return worst


def _relative(reference: Tensor, value: Tensor, what: str) -> float:
    if reference.shape != value.shape or reference.dtype != value.dtype:
        raise _DiffersError(
            f"{what}: {value.dtype} {tuple(value.shape)}, the model gives "
            f"{reference.dtype} {tuple(reference.shape)}"
        )
    if not reference.dtype.is_floating_point:
        if not torch.equal(reference, value):
            raise _DiffersError(f"{what}: other integers than the model's")
        return 0.0
    a, b = reference.double(), value.double()
    # A mask's minus infinity must be the same on both sides; the rest is compared as one vector.
    special = ~a.isfinite()
    if not torch.equal(special, ~b.isfinite()) or not torch.equal(
        a[special].nan_to_num(), b[special].nan_to_num()
    ):
        raise _DiffersError(f"{what}: not finite at other places than the model's")
    distance, norm = (a - b)[~special].norm().item(), a[~special].norm().item()
    error = distance / norm if norm else distance
    if not error <= TOLERANCE:
        raise _DiffersError(f"{what}: relative error {error:.1e}")
    return error


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output with its path, whatever containers it lies in."""
    if isinstance(value, Tensor):
        yield path or "output", value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}.{index}" if path else str(index))
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from _leaves(getattr(value, key), f"{path}.{key}" if path else key)
