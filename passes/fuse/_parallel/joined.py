"""Linear layers that read one activation, as one layer whose result is split."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import arguments
from graphwright.ir.layers.selectors import Layer

aten = torch.ops.aten


def why_not(editor: Editor, layer: Layer, node: fx.Node) -> str:
    """Why a layer cannot be joined with others; empty where it can."""
    given = arguments(node)
    if node.target is not aten.linear.default:
        return "it is no linear layer"
    for name in ("weight", "bias"):
        operand = given[name]
        if operand is None:
            continue
        if editor.tensor(operand) is None:
            return f"its {name} is computed in the graph"
        if len(editor.uses(str(operand.target))) > 1:
            return f"its {name} is used by another layer too"
    return ""


def join(editor: Editor, name: str, nodes: Sequence[fx.Node]) -> None:
    """Puts one layer in the place of several that read the same.

    Args:
        editor: changed.
        name: of the new layer.
        nodes: calls of linear layers with stored weights of their own; their order is that of
            the parts of the result.
    """
    first = min(nodes)
    given = [arguments(node) for node in nodes]
    weights = [editor.state[str(g["weight"].target)] for g in given]
    biases = [None if g["bias"] is None else editor.state[str(g["bias"].target)] for g in given]
    weight = _joined(editor, f"{name}.weight", weights)
    bias = None
    if any(b is not None for b in biases):
        full = [
            torch.zeros_like(w[:, 0]) if b is None else b
            for w, b in zip(weights, biases, strict=True)
        ]
        bias = _joined(editor, f"{name}.bias", full)
    x = given[0]["input"]
    whole = editor.call(aten.linear.default, x, weight, bias, before=first, like=first)
    sizes = [int(w.shape[0]) for w in weights]
    parts = editor.call(aten.split_with_sizes.default, whole, sizes, -1, before=first, like=first)
    made = [
        editor.call(operator.getitem, parts, number, before=first, like=node)
        for number, node in enumerate(nodes)
    ]
    for node, part in zip(nodes, made, strict=True):
        editor.replace(node, part)


def _joined(editor: Editor, name: str, tensors: Sequence[torch.Tensor]) -> fx.Node:
    value: torch.Tensor = torch.cat([t.detach() for t in tensors])
    if isinstance(tensors[0], nn.Parameter):
        value = nn.Parameter(value, requires_grad=any(t.requires_grad for t in tensors))
    return editor.get(editor.add_state(name, value))


def common_name(layers: Sequence[Layer], own: str) -> str:
    """`own` in the module that holds all the layers."""
    paths = [layer.name.split(".")[:-1] for layer in layers]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join([*common, own])
