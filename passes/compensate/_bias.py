"""Gives a layer another bias, in whatever form it has one."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.select import Layer
from graphwright.ir.weights import BIAS_ARGUMENT, bias_node, constant_value

ours = torch.ops.graphwright

INT32 = 2**31 - 1


def can_set_bias(layer: Layer) -> bool:
    """Whether the layer takes a bias, and has none, a stored one, or int32 codes of one."""
    if layer.kind not in BIAS_ARGUMENT:
        return False
    node = bias_node(layer)
    if node is None or node.op == "get_attr":
        return True
    return node.target is ours.dequantize.default and node.args[2] is None


def set_bias(editor: Editor, layer: Layer, bias: Tensor) -> None:
    """Gives the layer that bias (out,); integer codes keep their scale.

    Args:
        editor: of a copy of the program that the layer was found in.
        layer: one that `can_set_bias`.
        bias: as a float tensor.
    """
    node = next(n for n in editor.graph.nodes if n.name == layer.node.name)
    place = BIAS_ARGUMENT[layer.kind]
    old = node.args[place] if len(node.args) > place else None
    if isinstance(old, fx.Node) and old.op != "get_attr":
        _set_codes(editor, node, old, bias)
        return
    owner = str(old.target) if isinstance(old, fx.Node) else f"{layer.name}.bias"
    name = editor.add_state(f"{owner}_corrected", _like(editor, old, bias))
    args = [*node.args, *[None] * (place + 1 - len(node.args))]
    args[place] = editor.get(name)
    editor.set_args(node, *args, **node.kwargs)


def _like(editor: Editor, old: object, bias: Tensor) -> Tensor:
    """The bias as what it replaces is: a parameter stays one."""
    stored = editor.tensor(old)
    if isinstance(stored, torch.nn.Parameter):
        return torch.nn.Parameter(bias, requires_grad=stored.requires_grad)
    return bias


def _set_codes(editor: Editor, node: fx.Node, old: fx.Node, bias: Tensor) -> None:
    """Other codes at the same scale, for integer kernels."""
    scale = constant_value(editor.program, _stored(editor, old.args[1]))
    codes = torch.round(bias.double() / scale.double()).clamp(-INT32, INT32).to(torch.int32)
    owner = str(_stored(editor, old.args[0]).target)
    new = editor.get(editor.add_state(f"{owner}_corrected", codes))
    moved = editor.call(old.target, new, *old.args[1:], before=node, like=old)
    node.replace_input_with(old, moved)


def _stored(editor: Editor, node: object) -> fx.Node:
    assert isinstance(node, fx.Node)
    return node
