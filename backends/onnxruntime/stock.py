"""The standard exporter, for graphs with ops that our own translation does not know."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import _gemm_to_matmul_add

from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.translate import finish
from graphwright.ir.causes import innermost
from graphwright.ir.edit import Editor
from graphwright.ir.errors import LoweringError, ModelError
from graphwright.ir.files.exported import to_exported_program
from graphwright.ir.ops import OPS
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec


def export_with_torch(
    program: Program, opset: int, why: Untranslatable, watched: Sequence[str] = ()
) -> tuple[ir.Model, dict[str, ir.Value]]:
    """The program through `torch.onnx.export`, with names, dims and metadata as ours.

    Args:
        program, opset: as for `translate`.
        why: the node that called for it.
        watched: nodes whose values are wanted: the exporter renames and takes apart what is no
            output, so that they are outputs while it runs.

    Returns:
        the model, and the values of the watched nodes (a stored tensor by its name in the state).

    Raises:
        LoweringError: the standard exporter does not know an op either.
    """
    table = {op.overload: op.onnx for op in OPS.values()}
    seen, stored = _with_outputs(program, watched)
    signature = seen.signature
    try:
        exported = to_exported_program(seen)
        # With examples torch would run guards written for the module it once traced.
        exported.example_inputs = None
        # Decomposition must see what the trace saw: with gradients on, attention has other strides.
        with torch.no_grad(), _quiet():
            made = torch.onnx.export(
                exported,
                opset_version=opset,
                custom_translation_table=table,  # type: ignore[arg-type]
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, ModelError, RuntimeError, NotImplementedError) as error:
        from graphwright.backends.onnxruntime.blame import without_form

        culprit = without_form(program, opset, why)
        raise LoweringError(
            f"{culprit.node.target} has no ONNX form ({culprit.why})",
            where=f"node {culprit.node.name!r}",
            fix="Rewrite that operation in the model, or use another backend.",
            details=(f"the standard exporter: {innermost(error.__cause__ or error)}",),
        ) from error
    assert made is not None
    model = made.model
    rewrite(model, [_gemm_to_matmul_add.gemm_to_matmul_add_rule])
    values = dict(stored)
    for name in [name for name in watched if name not in stored][::-1]:
        values[name] = model.graph.outputs.pop()
    _name_dims(model, program)
    finish(model, program)
    return model, values


def _with_outputs(program: Program, watched: Sequence[str]) -> tuple[Program, dict[str, ir.Value]]:
    """The program with the calls among the nodes as further outputs; values of stored ones."""
    if not watched:
        return program, {}
    editor = Editor(program, by="lower.watch")
    nodes = {node.name: node for node in editor.graph.nodes}
    stored = {
        name: ir.Value(name=str(nodes[name].target))
        for name in watched if nodes[name].op == "get_attr"
    }  # fmt: skip
    calls = [name for name in watched if name not in stored]
    output = editor.graph.output_node()
    output.args = ((*output.args[0], *(nodes[name] for name in calls)),)  # type: ignore[misc]
    editor.changed = True
    specs = tuple(
        TensorSpec(f"watched.{i}", str(nodes[name].meta["val"].dtype).removeprefix("torch."), ())
        for i, name in enumerate(calls)
    )
    outputs = (*program.signature.outputs, *specs)
    seen = editor.finish(propagate=False)
    return seen.replace(signature=replace(program.signature, outputs=outputs)), stored


def _name_dims(model: ir.Model, program: Program) -> None:
    signature = program.signature
    for values, specs in (
        (model.graph.inputs, signature.inputs),
        (model.graph.outputs, signature.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(list(spec.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress and notices to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
