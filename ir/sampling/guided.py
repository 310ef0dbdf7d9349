"""A guided program out of a denoiser: one call of the network for both conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import (
    ALPHA,
    DENOISED,
    FACT,
    NEGATIVE,
    NOISE,
    SIGMA,
    Carried,
    Denoiser,
    Guidance,
)
from graphwright.ir.sampling.surgery import Interface, NewInput, halves, join
from graphwright.ir.signature import Dim, TensorSpec

aten = torch.ops.aten


def guided(
    program: Program,
    guider: nn.Module,
    by: str,
    *,
    parameters: Mapping[str, float],
    carried: Sequence[Carried] = (),
    looked_at: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
    two_directions: bool = False,
) -> Program:
    """The denoiser with guidance around it, D and E its first outputs.

    Every input with a row per sample is doubled, those that are conditions with what the guidance
    leads away from: an input `negative_<name>`, or a number that is put in.

    Args:
        program: a denoiser without guidance.
        guider: as in `guidance.py`.
        by: id of the pass.
        parameters: inputs of no dimension, in the guider's order, with their defaults.
        carried: tensors in the shape of the sample, in the guider's order.
        looked_at: further outputs of the guider, by name `batch` or `sample` for their shape.
        settings: for the driver.
        two_directions: E is not of the prediction that D is of.

    Raises:
        ModelError: the program has guidance already, no conditions, or a fixed batch.
    """
    record = Denoiser.required(program, by)
    batch = _refuse(record, program, by)
    edit = Interface(program, by)
    editor = edit.editor
    sample = edit.input(record.sample)
    negatives = {n: edit.add_negative(n, v) for n, v in record.conditions.items()}
    numbers = [edit.add_number(name, value) for name, value in parameters.items()]
    states = [_state(edit, record, item.input) for item in carried]
    first = next(n for n in editor.graph.nodes if n.op == "call_function")
    rows = editor.call(aten.sym_size.int, sample, 0, before=first)
    levels = [edit.input(name) for name in (ALPHA, SIGMA)]
    for spec in program.signature.inputs:
        if spec.shape[:1] == (batch,):
            node = edit.input(spec.name)
            other = negatives.get(spec.name)
            if spec.name in negatives and other is None:
                fill = record.conditions[spec.name]
                assert fill is not None
                fill = fill if spec.dtype.startswith("float") else int(fill)
                other = editor.call(aten.full_like.default, node, fill, before=first)
            _keep(rows, lambda node=node, other=other: join(editor, node, other, first))
    edit.propagate()  # the halves' sizes come from those of the doubled outputs
    split = [
        halves(editor, out, rows, edit.output, name)
        for name, out in zip((DENOISED, NOISE), edit.outputs, strict=False)
    ]
    reads = (split[0][0], split[0][1], split[1][0], split[1][1], sample, *levels)
    made = graft(editor, guider, *reads, *numbers, *states, name=by, before=edit.output)
    shape = edit.spec(record.sample).shape
    shapes: dict[str, tuple[Dim, ...]] = {DENOISED: shape, NOISE: shape}
    shapes |= {item.output: shape for item in carried}
    shapes |= {n: (batch,) if kind == "batch" else shape for n, kind in (looked_at or {}).items()}
    edit.set_outputs([(n, node, shapes[n]) for n, node in zip(shapes, made, strict=True)])
    editor.facts[FACT] = record.replace(
        guidance=Guidance(
            by, dict(parameters), dict(settings or {}), two_directions,
            tuple(NEGATIVE + n for n, node in negatives.items() if node is not None),
        ),
        carried=tuple(carried),
    ).to_json()  # fmt: skip
    return edit.finish()


def _keep(rows: fx.Node, edit: object) -> None:
    """Runs an edit that leaves what `rows` reads alone."""
    before = rows.args
    assert callable(edit)
    edit()
    rows.args = before


def _refuse(record: Denoiser, program: Program, by: str) -> str:
    if record.guidance is not None:
        raise ModelError(
            f"{by}: {record.guidance.by} has put guidance around this denoiser already",
            fix="Keep one of the two.",
        )
    if record.distilled is not None:
        raise ModelError(
            f"{by}: the network was distilled from guided predictions and takes their scale as "
            f"{record.distilled!r}; it has no prediction without the condition to lead away from",
            fix="Leave the pass out, and give that input when sampling.",
        )
    if not record.conditions:
        raise ModelError(
            f"{by}: the denoiser has no condition to guide by",
            fix="Name them in `conditions` of sample.denoiser.",
        )
    (batch,) = {s.shape[0] for s in program.signature.inputs if s.name == record.sample}
    if not isinstance(batch, str):
        raise ModelError(
            f"{by}: the batch is fixed at {batch}, and guidance doubles it",
            fix="Trace the model with a free batch (`shape: [batch, ...]` in the spec).",
        )
    for name in record.conditions:
        spec = next(s for s in program.signature.inputs if s.name == name)
        if spec.shape[:1] != (batch,):
            raise ModelError(f"{by}: the condition {name!r} has no row per sample")
    return batch


def _state(edit: Interface, record: Denoiser, name: str) -> fx.Node:
    spec = edit.spec(record.sample)
    example: Tensor = edit.example(record.sample)
    zeros = torch.zeros_like(example)
    return edit.add_input(
        NewInput(TensorSpec(name, spec.dtype, spec.shape), zeros), edit.input(record.sample)
    )
