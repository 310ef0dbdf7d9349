"""Finds the first node at which a translated model parts from its program."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.runtime import SessionSettings, open_session
from graphwright.backends.onnxruntime.translate import translate_with_values
from graphwright.ir.check.fidelity import compare
from graphwright.ir.program import Program


def first_differing_node(
    program: Program, opset: int, settings: SessionSettings, bound: float
) -> str:
    """One line that names the node; empty when it cannot be told."""
    try:
        model, values = translate_with_values(program, opset)
    except Untranslatable:
        return ""
    names = {value.name for value in model.graph.outputs}
    watched = {
        node: value
        for node, value in values.items()
        if isinstance(value, ir.Value) and value.producer() is not None
    }
    for value in watched.values():
        if value.name not in names:
            names.add(value.name)
            model.graph.outputs.append(value)
    try:
        session = open_session(ir.to_proto(model).SerializeToString(), settings)
        feeds = {
            spec.name: tensor.detach().cpu().numpy()
            for spec, tensor in zip(program.signature.inputs, program.examples, strict=True)
        }
        order = [str(value.name) for value in model.graph.outputs]
        actual = dict(zip(order, session.run(order, feeds), strict=True))
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f"ONNX Runtime says: {text[0]}"
    recorder = _Recorder(program)
    with torch.no_grad():
        recorder.run(*program.examples)
    for node in program.graph.nodes:
        if node not in watched or node.name not in recorder.kept:
            continue
        expected = recorder.kept[node.name]
        got = torch.from_numpy(actual[str(watched[node].name)])
        if expected.shape != got.shape or not compare(expected, got).relative <= bound:
            return f"first node that differs: {node.name} ({node.target})"
    return ""


class _Recorder(fx.Interpreter):
    """Runs a program and keeps the tensor of every call, by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.kept: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function":
            self.kept[n.name] = value
        return value
