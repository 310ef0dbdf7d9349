"""bias steps: a projection's bias goes into the attention or norm kernel that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import argument, insert, is_call, is_onnx
from graphwright.ir.edit import Editor

aten = torch.ops.aten


def bias_of(node: Any) -> fx.Node | None:
    """The stored bias of a plain linear that one node alone reads; None otherwise.

    A weight that a node computes (a quantized one) keeps its bias beside it, for the kernels that
    take both.
    """
    if not is_call(node, aten.linear.default) or len(node.users) != 1:
        return None
    weight, bias = node.args[1], argument(node, 2, "bias")
    is_stored = isinstance(bias, fx.Node) and bias.op == weight.op == "get_attr"
    return bias if is_stored else None


def bare(editor: Editor, linear: fx.Node) -> fx.Node:
    """The linear without its bias."""
    value = linear.meta["val"]
    return insert(editor, aten.linear.default, *linear.args[:2], before=linear, value=value)


def move_biases(editor: Editor) -> int:
    """Moves biases of projections into MultiHeadAttention and the skip norms."""
    count = 0
    for node in list(editor.graph.nodes):
        if is_onnx(node, "MultiHeadAttention"):
            count += _into_attention(editor, node)
        elif is_onnx(node, "SkipLayerNormalization"):
            count += _into_norm(editor, node, 5)
        elif is_onnx(node, "SkipSimplifiedLayerNormalization"):
            count += _into_norm(editor, node, 4)
    return count


def _set_inputs(editor: Editor, node: fx.Node, inputs: list[Any]) -> None:
    node.args = (inputs, *node.args[1:])
    editor.changed = True


def _into_attention(editor: Editor, node: fx.Node) -> int:
    inputs: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    biases = [bias_of(x) for x in inputs[:3]]
    if len(inputs) < 4 or inputs[3] is not None or any(b is None for b in biases):
        return 0
    tensors = [editor.tensor(b) for b in biases]
    if any(t is None or t.dtype != torch.float32 for t in tensors):
        return 0
    names = [str(b.target) for b in biases if b is not None]
    with torch.no_grad():
        merged = torch.cat([t.detach() for t in tensors if t is not None])
    name = editor.add_state("+".join(names), merged)
    inputs[:3] = [bare(editor, x) for x in inputs[:3]]
    inputs[3] = editor.get(name)
    _set_inputs(editor, node, inputs)
    return 1


def _into_norm(editor: Editor, node: fx.Node, count: int) -> int:
    inputs: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    if len(inputs) >= count:
        return 0
    for place in (0, 1):
        bias = bias_of(inputs[place])
        if bias is not None and sizes_of(bias) == sizes_of(inputs[2]):
            inputs = [*inputs, *[None] * (count - 1 - len(inputs)), bias]
            inputs[place] = bare(editor, inputs[place])
            _set_inputs(editor, node, inputs)
            return 1
    return 0
