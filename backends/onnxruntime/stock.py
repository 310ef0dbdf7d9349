"""The standard exporter, for graphs with ops that our own translation does not know."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import _gemm_to_matmul_add

from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.translate import finish
from graphwright.ir.causes import innermost
from graphwright.ir.errors import LoweringError, ModelError
from graphwright.ir.files.exported import to_exported_program
from graphwright.ir.ops import OPS
from graphwright.ir.program import Program


def export_with_torch(program: Program, opset: int, why: Untranslatable) -> ir.Model:
    """The program through `torch.onnx.export`, with names, dims and metadata as ours.

    Raises:
        LoweringError: the standard exporter does not know an op either.
    """
    table = {op.overload: op.onnx for op in OPS.values()}
    signature = program.signature
    try:
        exported = to_exported_program(program)
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
        raise LoweringError(
            f"{why.node.target} has no ONNX form ({why.why})",
            where=f"node {why.node.name!r}",
            fix="Rewrite that operation in the model, or use another backend.",
            details=(f"the standard exporter: {innermost(error.__cause__ or error)}",),
        ) from error
    assert made is not None
    model = made.model
    rewrite(model, [_gemm_to_matmul_add.gemm_to_matmul_add_rule])
    _name_dims(model, program)
    finish(model, program)
    return model


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
