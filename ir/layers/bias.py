"""Gives a layer another bias, in whatever form it has one."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, EXPERTS
from graphwright.ir.layers.products import bias_node
from graphwright.ir.layers.selectors import Layer

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


def set_bias(editor: Editor, layer: Layer, bias: Tensor, factor: Tensor | None = None) -> None:
    """Gives the layer that bias (out,).

    Args:
        editor: of a copy of the program that the layer was found in.
        layer: one that `can_set_bias`.
        bias: as a float tensor.
        factor: (out,) what the weight's scales were multiplied with; the scales of integer codes
            follow, because integer kernels want them to be input scale times weight scale.
    """
    node = next(n for n in editor.graph.nodes if n.name == layer.node.name)
    place = BIAS_ARGUMENT[layer.kind]
    old = node.args[place] if len(node.args) > place else None
    if isinstance(old, fx.Node) and old.op != "get_attr":
        _set_codes(editor, node, old, bias, factor)
        return
    if isinstance(old, fx.Node):
        new = _replaced(editor, old, _like(editor, old, bias))
    else:
        joint = "_" if layer.kind in EXPERTS else "."
        new = editor.get(editor.add_state(f"{layer.name}{joint}bias", bias))
    args = [*node.args, *[None] * (place + 1 - len(node.args))]
    args[place] = new
    editor.set_args(node, *args, **node.kwargs)


def _replaced(editor: Editor, old: fx.Node, value: Tensor) -> fx.Node:
    """A stored tensor with another value: under its name, unless others read it too."""
    name = str(old.target)
    if len(editor.uses(name)) == 1:
        editor.set_state(name, value)
        return old
    return editor.get(editor.add_state(f"{name}_own", value))


def _like(editor: Editor, old: object, bias: Tensor) -> Tensor:
    """The bias as what it replaces is: a parameter stays one."""
    stored = editor.tensor(old)
    if isinstance(stored, torch.nn.Parameter):
        return torch.nn.Parameter(bias, requires_grad=stored.requires_grad)
    return bias


def _set_codes(
    editor: Editor, node: fx.Node, old: fx.Node, bias: Tensor, factor: Tensor | None
) -> None:
    codes, scale = (_stored(part) for part in old.args[:2])
    step = constant_value(editor.program, scale)
    if factor is not None:
        step = (step.double() * factor.double()).to(step.dtype)
    value = torch.round(bias.double() / step.double()).clamp(-INT32, INT32).to(torch.int32)
    new = [_replaced(editor, codes, value), _replaced(editor, scale, step)]
    moved = editor.call(old.target, *new, *old.args[2:], before=node, like=old)
    node.replace_input_with(old, moved)


def _stored(node: object) -> fx.Node:
    assert isinstance(node, fx.Node)
    return node
