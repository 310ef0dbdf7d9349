"""Nodes of a graph: their operators, arguments, and our own record on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

VIEWS = {
    "view", "reshape", "expand", "expand_as", "transpose", "permute", "t", "select", "slice",
    "squeeze", "unsqueeze", "chunk", "split", "split_with_sizes", "unbind", "narrow", "diagonal",
    "alias", "detach", "view_as", "flatten", "unflatten", "contiguous", "to", "unfold", "T", "mT",
    "movedim", "swapaxes", "real", "imag", "getitem",
}  # fmt: skip
"""Ops whose result may share memory with an operand."""


def op_name(node: fx.Node) -> str:
    """Base name of an ATen call, as `linear`; empty for anything that is not an operator."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", "") if node.op == "call_function" else ""


def gw_meta(node: fx.Node) -> dict[str, Any]:
    """Our own JSON-able record on a node; a copy, empty when there is none."""
    return dict(node.meta.get("custom", {}).get("gw", {}))


def set_gw_meta(node: fx.Node, **entries: Any) -> None:
    """Adds entries to our record on a node (a value of None removes the entry)."""
    record = {**gw_meta(node), **entries}
    record = {key: value for key, value in record.items() if value is not None}
    node.meta["custom"] = {**node.meta.get("custom", {}), "gw": record}


def module_paths(node: fx.Node) -> Iterator[str]:
    """Names of the modules that a node is in, outermost first."""
    for entry in node.meta.get("nn_module_stack", {}).values():
        path = str(entry[0] if isinstance(entry, (tuple, list)) else entry)
        if path:
            yield path


def adapter_of(node: fx.Node) -> str:
    """Name of the adapter that a node belongs to; empty for any other node."""
    return str(gw_meta(node).get("adapter", ""))


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that all of a program's recorded values belong to."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and order; metadata copied one level deep."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
        mapping[node].meta = dict(node.meta)
    return new


def full_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments with defaults filled in, and all keyword arguments by name."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            continue
        if argument.name not in kwargs and argument.has_default_value():
            kwargs[argument.name] = argument.default_value
        if not argument.kwarg_only and len(args) == position and argument.name in kwargs:
            args.append(kwargs[argument.name])
    return args, kwargs


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by the names of its schema, defaults filled in."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    out: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            out[argument.name] = node.args[position]
        else:
            default = argument.default_value if argument.has_default_value() else None
            out[argument.name] = node.kwargs.get(argument.name, default)
    return out


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)
