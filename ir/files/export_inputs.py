"""The inputs of an ExportedProgram, in the words of a spec's `inputs`."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument


def declared_inputs(exported: ExportedProgram) -> dict[str, dict[str, Any]] | None:
    """dtype, shape and example sizes per tensor input.

    A dynamic size is named after its symbol, or by its expression's position where it is one. None
    when an argument is no tensor, for then a spec has to say what to pass.
    """
    specs = [s for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    if not all(isinstance(spec.arg, TensorArgument) for spec in specs):
        return None
    call = exported.module_call_graph[0].signature
    if call is not None and len(call.forward_arg_names or specs) != len(specs):
        return None  # lists or dicts of tensors: the leaves are not the arguments
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    out: dict[str, dict[str, Any]] = {}
    for spec in specs:
        value = nodes[spec.arg.name].meta["val"]
        shape, example = [], []
        for size in value.shape:
            dynamic = isinstance(size, torch.SymInt)
            symbol = dynamic and size.node.expr.is_Symbol
            shape.append(str(size) if symbol else _hint(size))
            example.append(_hint(size))
        out[spec.arg.name] = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": tuple(shape),
            "example": tuple(example),
        }
    return out


def _hint(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint
    return 2 if hint is None else int(hint)
