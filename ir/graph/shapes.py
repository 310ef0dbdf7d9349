"""Shape and dtype propagation after an edit, on the program's own fake mode and symbols."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.fake_calls import FakeCalls
from graphwright.ir.graph.nodes import fake_mode_of, gw_meta
from graphwright.ir.program import Program


def propagate_shapes(program: Program) -> None:
    """Recomputes `meta["val"]` of every node of `program.graph` in place (metadata only).

    Raises:
        ModelError: a node does not accept the shapes it is given; names the node, its operands'
            shapes and the pass that made it.
    """
    mode = fake_mode_of(program.graph)
    call = FakeCalls(mode)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = node.meta["val"]
            elif node.op == "get_attr":
                tensor = program.state[str(node.target)]
                values[node] = node.meta.get("val")
                if not _is_like(values[node], tensor):
                    values[node] = mode.from_tensor(tensor.detach(), static_shapes=True)
            elif node.op == "call_function":
                values[node] = _evaluate(node, values, call)
            else:
                continue
            node.meta["val"] = values[node]


def _is_like(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a recorded value is what a stored tensor would get anew."""
    if not isinstance(value, FakeTensor) or value.requires_grad:
        return False
    now, then = ((t.shape, t.stride(), t.dtype, t.device, t.layout) for t in (value, tensor))
    return now == then


def _evaluate(node: fx.Node, values: dict[fx.Node, Any], call: FakeCalls) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    try:
        return call(node.target, args, kwargs)
    except Exception as error:
        operands = [
            f"{n.name}: {tuple(values[n].shape)}"
            for n in node.all_input_nodes
            if isinstance(values[n], torch.Tensor)
        ]
        maker = gw_meta(node).get("by", "tracing")
        raise ModelError(
            f"shapes do not fit: {innermost(error)}",
            where=f"node {node.name} ({node.target}), made by {maker}",
            details=tuple(operands),
        ) from error
