"""ONNX ops that a step put into the graph, and our own custom ops by their ONNX face."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
import torch.onnx.ops  # registers the symbolic ops
from torch import fx
from torch.onnx.ops._symbolic_impl import EncodedAttrs

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable

symbolic = torch.ops.onnx_symbolic


def _attributes(kwargs: dict[str, Any]) -> dict[str, Any]:
    keys = ("attr_keys", "attr_types", "attr_pos", "attr_ints", "attr_floats", "attr_strs")
    return EncodedAttrs(**{key: list(kwargs[key]) for key in keys}).to_dict()


def _emit(e: Emitter, inputs: Any, kind: str, count: int, kwargs: dict[str, Any]) -> Any:
    values = [None if i is None else e.values[i] for i in inputs]
    domain = kwargs.get("domain", "")
    return e.multi(kind, count, *values, domain=domain, **_attributes(kwargs))


@translates(symbolic._symbolic.default)
def single(e: Emitter, node: fx.Node, inputs: Any, kind: str, _: int, **kwargs: Any) -> Any:
    return _emit(e, inputs, kind, 1, kwargs)[0]


@translates(symbolic._symbolic_multi_out.default)
def several(e: Emitter, node: fx.Node, inputs: Any, kind: str, dtypes: Any, **kwargs: Any) -> Any:
    return _emit(e, inputs, kind, len(dtypes), kwargs)


def by_face(e: Emitter, node: fx.Node, face: Any) -> Any:
    """Translates a node by an onnxscript function, written in opset 18, and inlines its nodes."""
    from onnxscript import evaluator, values
    from torch.onnx._internal.exporter import _building, _tensors

    opset = values.Opset("", 18)
    constants: dict[Any, ir.Value] = {}
    recorder = _building.OpRecorder(opset, constants)  # type: ignore[abstract]
    stand_ins: dict[Any, Any] = {}

    def stand_in(arg: Any) -> Any:
        if isinstance(arg, list | tuple):
            return [stand_in(a) for a in arg]
        if not isinstance(arg, fx.Node):
            return arg
        if arg not in stand_ins:
            fake = arg.meta["val"]
            if not isinstance(fake, torch.Tensor):
                raise Untranslatable(node, "takes a dynamic number")
            value = _tensors.SymbolicTensor(opset, name=f"{node.name}.arg{len(stand_ins)}")
            value.shape = ir.Shape(e.shape_names(fake.shape))
            value.dtype = ir.tensor_adapters.from_torch_dtype(fake.dtype)
            stand_ins[arg] = value
        return stand_ins[arg]

    with evaluator.default_as(recorder):
        result = face(*map(stand_in, node.args), **{k: stand_in(v) for k, v in node.kwargs.items()})
    for arg, value in stand_ins.items():
        value.replace_all_uses_with(e.values[arg])
    recorded = dict.fromkeys(v for n in recorder.nodes for v in n.inputs if v is not None)
    e.adopt(recorder.nodes, [v for v in recorded if v.const_value is not None and not v.producer()])
    e.functions.extend(recorder.functions.values())  # type: ignore[arg-type]
    return list(result) if isinstance(result, tuple | list) else result
