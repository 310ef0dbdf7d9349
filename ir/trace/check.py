"""Runs a fresh program against its model, at the example's sizes and at others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from graphwright.ir.check.fidelity import compare
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange
from graphwright.ir.trace.assemble import output_names
from graphwright.ir.trace.calling import FlatModel
from graphwright.ir.trace.dims import Dynamic, dim_names, example_sizes, resized

TOLERANCE = 1e-4
"""Relative error that still counts as rounding: the same operations, other kernels and orders."""


@dataclass
class Verdict:
    """What running the program taught: dimensions to fix, ranges to narrow, what to tell."""

    fixed: set[str] = field(default_factory=set)
    ranges: dict[str, DimRange] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_against_model(program: Program, flat: FlatModel, dynamic: Dynamic) -> Verdict:
    """Compares outputs at the example's sizes, at one more of each free dimension, and at 1.

    Raises:
        ModelError: the program and the model differ on the example inputs.
    """
    verdict = Verdict()
    agreed = _agree(program, flat, flat.inputs)
    if agreed is False:
        if _agree_with_itself(flat):
            raise ModelError(
                "the traced program computes something else than the model",
                fix="Report this model; until then trace a part of it that agrees.",
            )
        verdict.notes.append("the model gives other results on every call; it was not compared")
        return verdict
    sizes = example_sizes(flat.inputs, dynamic)
    larger = {dim: size + 1 for dim, size in sizes.items()}
    bad = _differing(program, flat, dynamic, larger)
    for dim in bad:
        verdict.fixed.add(dim)
        verdict.notes.append(
            f"dimension {dim!r} is fixed at {sizes[dim]}: at {larger[dim]} the traced program "
            "and the model differ"
        )
    if bad:
        return verdict
    for dim in _differing(program, flat, dynamic, dict.fromkeys(sizes, 1)):
        known = program.signature.dims[dim]
        verdict.ranges[dim] = DimRange(max(2, known.min), known.max)
        verdict.notes.append(
            f"dimension {dim!r} is 2 or more: at 1 the model takes another way through its code"
        )
    return verdict


def batch_axes(flat: FlatModel) -> Dynamic:
    """The first axis of every input, as the dimension `batch`; empty when that cannot be free.

    It can when all inputs agree in it, the model runs with one more, and the outputs grow.
    """
    sizes = {t.shape[0] for t in flat.inputs.values() if t.dim() > 0}
    if len(sizes) != 1:
        return {}
    axes = {name: {0: "batch"} for name, t in flat.inputs.items() if t.dim() > 0}
    (size,) = sizes
    try:
        before = flat(*flat.inputs.values())
        after = flat(*resized(flat.inputs, axes, {"batch": size + 1}).values())
    except Exception:
        return {}
    grew = any(a.shape != b.shape for a, b in zip(before, after, strict=True))
    return axes if grew else {}


def _differing(
    program: Program, flat: FlatModel, dynamic: Dynamic, sizes: Mapping[str, int]
) -> list[str]:
    """Dimensions at whose new size the program parts from the model."""
    allowed = {dim: size for dim, size in sizes.items() if _within(program, dim, size)}
    if not allowed or _agree(program, flat, resized(flat.inputs, dynamic, allowed)) is True:
        return []
    bad = []
    for dim in dim_names(dynamic):
        if dim in allowed:
            inputs = resized(flat.inputs, dynamic, {dim: allowed[dim]})
            if _agree(program, flat, inputs) is False:
                bad.append(dim)
    return bad


def _within(program: Program, dim: str, size: int) -> bool:
    bounds = program.signature.dims.get(dim)
    if bounds is None:
        return False
    return size >= bounds.min and (bounds.max is None or size <= bounds.max)


def _agree(program: Program, flat: FlatModel, inputs: Mapping[str, Tensor]) -> bool | None:
    """Whether both give the same; None where the model itself refuses these inputs."""
    tensors = tuple(inputs.values())
    try:
        expected = flat(*(t.clone() for t in tensors))
    except Exception:
        return None
    try:
        actual = program.run_flat(tuple(t.clone() for t in tensors))
    except Exception:
        return False
    # A size among the outputs is a number in eager mode and a tensor in the graph.
    names = output_names(flat.record.structure, flat.inputs)
    found = {spec.name: t for spec, t in zip(program.signature.outputs, actual, strict=True)}
    if any(names[i] not in found for i in range(len(expected))):
        return False
    return _close(expected, tuple(found[names[i]] for i in range(len(expected))))


def _agree_with_itself(flat: FlatModel) -> bool:
    tensors = tuple(flat.inputs.values())
    return _close(flat(*tensors), flat(*tensors))


def _close(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]) -> bool:
    fidelity = compare(expected, actual)
    return not fidelity.broken and fidelity.relative <= TOLERANCE
