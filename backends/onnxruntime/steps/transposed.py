"""Quantized transposed convolutions as plain ones, for which the runtime has an integer kernel.

    relu(conv_transpose(x, W, b))   pixel_shuffle(quantize(relu(conv(x, W', b')))), cut

It is quantized between the convolution and the shuffle too, where the runtime fuses that: moving
codes does not change them, so that the quantizer behind gives the same once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.steps.graph import is_call
from graphwright.ir.edit import Editor
from graphwright.ir.layers.transposed import OPERATOR, SubPixel, even_sub_pixel

aten = torch.ops.aten
ours = torch.ops.graphwright
END = 2**63 - 1


def split_transposed(editor: Editor) -> dict[str, str]:
    """Rewrites every transposed convolution on codes that has a plain form.

    Returns:
        node of the layer -> node of the plain convolution.
    """
    found = {}
    for node in list(editor.graph.find_nodes(op="call_function", target=OPERATOR)):
        form = even_sub_pixel(node)
        last = _quantizer(node)
        if form is not None and last is not None and _is_quantized(node):
            name = node.name
            found[name] = _rewrite(editor, node, last, form).name
    return found


def _is_quantized(node: fx.Node) -> bool:
    """Whether input, weight and bias are codes."""
    operands = [node.args[1], *(a for a in node.args[2:3] if a is not None)]
    return is_call(node.args[0], ours.fake_quantize.default) and all(
        isinstance(a, fx.Node) and is_call(a, ours.dequantize.default) and a.args[2] is None
        for a in operands
    )


def _quantizer(node: fx.Node) -> fx.Node | None:
    """The quantizer that alone reads the node, or its ReLU."""
    for _ in range(2):
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if is_call(user, ours.fake_quantize.default):
            return user
        if not is_call(user, aten.relu.default):
            return None
        node = user
    return None


def _rewrite(editor: Editor, node: fx.Node, last: fx.Node, form: SubPixel) -> fx.Node:
    """The plain convolution; the quantizer `last` stays, for the layers that read it."""

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, *args, before=node, like=node)

    def rebuilt(source: Any, *, is_weight: bool) -> fx.Node:
        codes, scale = (editor.state[str(a.target)] for a in source.args[:2])
        made = form.weight(codes) if is_weight else form.channels(codes)
        names = [str(a.target) + ".plain" for a in source.args[:2]]
        for name, tensor in zip(names, (made, form.channels(scale)), strict=True):
            if name not in editor.state:
                editor.add_state(name, tensor)
        return call(ours.dequantize.default, *map(editor.get, names), None, 0)

    weight = rebuilt(node.args[1], is_weight=True)
    bias = None
    if len(node.args) > 2 and node.args[2] is not None:
        bias = rebuilt(node.args[2], is_weight=False)
    padding = [taps - 1 for taps in form.taps]
    plain = call(aten.conv2d.default, node.args[0], weight, bias, [1, 1], padding)
    value = plain
    if not is_call(last.args[0], OPERATOR):
        value = call(aten.relu.default, value)
    value = call(ours.fake_quantize.default, value, *last.args[1:])
    if form.stride[0] > 1:
        value = call(aten.pixel_shuffle.default, value, form.stride[0])
    for axis, (begin, end) in enumerate(zip(form.begin, form.end, strict=True), start=2):
        if begin or end:
            value = call(aten.slice.Tensor, value, axis, begin, -end if end else END)
    source = last.args[0]
    assert isinstance(source, fx.Node)
    editor.replace(source, value)
    return plain
