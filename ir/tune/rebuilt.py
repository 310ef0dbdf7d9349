"""Frozen weights in codes are rebuilt again in the backward, and not kept for it.

The gradient of a layer's input asks for the layer's weight. Autograd keeps the floats that the
forward has made of the codes, all layers at once, which is the whole model in floats. Rebuilding
them costs a fraction of a product and keeps the codes alone (Dettmers et al. 2023, "QLoRA").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.graph.nodes import full_arguments

aten = torch.ops.aten

Rebuild = Callable[..., Tensor]


def rebuild_in_backward(graph: fx.Graph, state: Mapping[str, Tensor]) -> int:
    """Lets linear layers on frozen codes rebuild their weight in the backward; counts them.

    Args:
        graph: of training, rewritten in place.
        state: its tensors by name.
    """
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        x, weight, bias = full_arguments(node)[0][:3]
        if not isinstance(weight, fx.Node) or weight.op != "call_function":
            continue
        if depends_on_input(weight):
            continue
        inner, leaves = _below(weight)
        if any(state[str(leaf.target)].requires_grad for leaf in leaves):
            continue
        with graph.inserting_before(node):
            layer = _layer(_function(inner, leaves, weight))
            new = graph.call_function(layer, (x, bias, *leaves))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        for dead in reversed(inner):
            if not dead.users:
                graph.erase_node(dead)
        count += 1
    return count


def _below(weight: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls that a weight is computed by, in order, and the stored tensors that they read."""
    inner: dict[fx.Node, None] = {}
    leaves: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node.op == "get_attr":
            leaves[node] = None
        elif node not in inner:
            for operand in node.all_input_nodes:
                visit(operand)
            inner[node] = None

    visit(weight)
    return list(inner), list(leaves)


def _function(inner: list[fx.Node], leaves: list[fx.Node], weight: fx.Node) -> Rebuild:
    """The computation of a weight as a function of its stored tensors."""
    places = {leaf: index for index, leaf in enumerate(leaves)}
    offset = len(places)
    places |= {node: offset + index for index, node in enumerate(inner)}
    steps: list[tuple[Any, Any, Any]] = [
        (node.target, *_with_places(node, places)) for node in inner
    ]
    result = places[weight]

    def rebuild(*stored: Tensor) -> Tensor:
        values: list[Any] = list(stored)
        for target, args, kwargs in steps:
            args, kwargs = _filled((args, kwargs), values)
            values.append(target(*args, **kwargs))
        found: Tensor = values[result]
        return found

    return rebuild


class _Place:
    """Stands for a value among those that a weight is computed from."""

    def __init__(self, index: int) -> None:
        self.index = index


def _with_places(node: fx.Node, places: Mapping[fx.Node, int]) -> tuple[Any, Any]:
    def place(operand: fx.Node) -> Any:
        return _Place(places[operand])

    mapped: Any = fx.map_arg((node.args, dict(node.kwargs)), place)
    return mapped[0], mapped[1]


def _filled(value: Any, values: list[Any]) -> Any:
    if isinstance(value, _Place):
        return values[value.index]
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, values) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    return value


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, rebuild: Rebuild, *stored: Tensor) -> Any:
        ctx.rebuild, ctx.has_bias = rebuild, bias is not None
        ctx.save_for_backward(*stored)
        return functional.linear(x, rebuild(*stored), bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = outputs
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ ctx.rebuild(*ctx.saved_tensors).to(gradient.dtype)
        if ctx.has_bias and ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return (of_x, of_bias, None, *(None for _ in ctx.saved_tensors))


def _layer(rebuild: Rebuild) -> Callable[..., Tensor]:
    """x W^T + b, where W is a function of stored tensors that nothing trains."""

    def rebuilt_linear(x: Tensor, bias: Tensor | None, *stored: Tensor) -> Tensor:
        if any(tensor.requires_grad for tensor in stored):  # a recipe has put a value there
            return functional.linear(x, rebuild(*stored), bias)
        result: Tensor = _Rebuilt.apply(x, bias, rebuild, *stored)  # type: ignore[no-untyped-call]
        return result

    return rebuilt_linear
