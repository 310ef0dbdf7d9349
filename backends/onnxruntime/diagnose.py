"""Finds the first node at which a translated model parts from its program."""

from __future__ import annotations

import operator

import onnx_ir as ir
import torch
from torch import Tensor, fx

from graphwright.backends.onnxruntime.check import Differs, is_as_near
from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.runtime import (
    SessionSettings,
    feeds_for,
    open_session,
)
from graphwright.backends.onnxruntime.translate import translate_with_values
from graphwright.ir.causes import innermost
from graphwright.ir.check.fidelity import compare
from graphwright.ir.check.precision import Walk, roundoff
from graphwright.ir.errors import LoweringError
from graphwright.ir.graph.random import named, random_nodes
from graphwright.ir.program import Program


def failure(
    program: Program, error: Differs, opset: int, settings: SessionSettings, bound: float
) -> LoweringError:
    """The error for a model that is wrong without any step; names the node where it can.

    Args:
        program: what was translated.
        error: how the model differs.
        opset, settings, bound: as for `first_differing_node`.
    """
    drawn = random_nodes(program.graph)
    if drawn:
        return LoweringError(
            f"{named(drawn)} random numbers, and the model draws others: it cannot be compared "
            "with the program",
            fix="Make them an input of the model, or use the backend triton.",
            details=(str(error),),
        )
    node = first_differing_node(program, opset, settings, bound, error.inputs)
    return LoweringError(
        str(error),
        fix="Leave that operation out of what is compiled, or use the backend triton.",
        details=(node,) if node else (),
    )


def first_differing_node(
    program: Program,
    opset: int,
    settings: SessionSettings,
    bound: float,
    inputs: tuple[Tensor, ...] | None = None,
) -> str:
    """One line that names the first node that differs beyond rounding; empty when none can be told.

    Args:
        program: what was translated.
        opset, settings: as the model is made and run.
        bound: relative error that needs no look in float64.
        inputs: one tensor per input; the examples when None.
    """
    inputs = program.examples if inputs is None else inputs
    try:
        model, watched = _model(program, opset)
    except LoweringError:
        return ""
    names = {value.name for value in model.graph.outputs}
    for value in watched.values():
        if value.name not in names:
            names.add(value.name)
            model.graph.outputs.append(value)
    try:
        session = open_session(ir.to_proto(model).SerializeToString(), settings)
        feeds = feeds_for(session, program.signature, inputs)
        order = [str(value.name) for value in model.graph.outputs]
        arrays = session.run(order, feeds)
    except Exception as error:
        return f"ONNX Runtime says: {innermost(error)}"
    actual = dict(zip(order, map(torch.from_numpy, arrays), strict=True))
    shown = {node: actual[str(value.name)] for node, value in watched.items()}
    node = _first(program, inputs, shown, bound)
    if node is None:
        return "no node differs once it is an output: what ONNX Runtime fuses does"
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]  # a result of the operator that is meant
    scope = next(reversed(node.meta.get("nn_module_stack", {})), "")
    return f"first node that differs: {node.name} ({node.target}){f' in {scope}' if scope else ''}"


def _model(program: Program, opset: int) -> tuple[ir.Model, dict[str, ir.Value]]:
    """The program translated, and the values of its nodes by name.

    Raises:
        LoweringError: the standard exporter does not know an op either.
    """
    try:
        model, values = translate_with_values(program, opset)
    except Untranslatable as why:
        from graphwright.backends.onnxruntime.stock import export_with_torch

        wanted = [
            node.name for node in program.graph.nodes
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        ]  # fmt: skip
        return export_with_torch(program, opset, why, wanted)
    return model, {
        node.name: value
        for node, value in values.items()
        if isinstance(value, ir.Value) and _is_in(model, value)
    }


def _is_in(model: ir.Model, value: ir.Value) -> bool:
    """Whether a node of the model gives it; what nothing reads is no longer there."""
    producer = value.producer()
    return producer is not None and producer.graph is model.graph


def _first(
    program: Program, inputs: tuple[Tensor, ...], shown: dict[str, Tensor], bound: float
) -> fx.Node | None:
    """The first node whose value the runtime does not give, up to rounding."""
    own, exact = (Walk(program, inputs, wide=wide) for wide in (False, True))
    calls: list[fx.Node] = [n for n in program.graph.nodes if n.op == "call_function"]
    for node in calls:
        value, reference = own.step(node), exact.step(node)
        got = shown.get(node.name)
        if isinstance(value, Tensor) and got is not None:
            if got.shape != value.shape:
                return node
            near = compare(value, got).within(bound)
            if not near and not is_as_near(reference, value, got, roundoff(program)):
                return node
        for walk in (own, exact):
            walk.release(node)
    return None
