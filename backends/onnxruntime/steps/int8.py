"""int8: quantized layers to the integer kernels of ONNX Runtime's CPU provider.

    linear(fake_quantize_dynamic(x), W)   DynamicQuantizeLinear + MatMulIntegerToFloat
    linear(fake_quantize(x), W)           QuantizeLinear + MatMulIntegerToFloat
    conv(fake_quantize(x), W, b)          Q/DQ around Conv, which the runtime makes QLinearConv
    embedding(W, ids)                     Gather of codes and of scales
    conv_transpose(..)                    the same by a plain convolution (`transposed.py`)

Matrix products are written as the contrib op that the runtime's own fusion would make, so that no
fusion can miss; several layers that read one activation share its quantizer. Convolutions are left
to the runtime's fusion, which also takes in the additions and moves between them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import (
    is_call,
    is_float32,
    onnx_call,
    onnx_calls,
    size,
)
from graphwright.backends.onnxruntime.steps.transposed import split_transposed
from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import matrix_product

aten = torch.ops.aten
ours = torch.ops.graphwright

TAPS = "lower.int8.taps"
"""Fact: quantizer of the program -> nodes with its codes, scale and zero point in the runtime."""

REPLACED = "lower.int8.replaced"
"""Fact: node of a matrix product -> node of the contrib op in its place."""


@dataclass(frozen=True)
class Codes:
    """A stored int8 weight: names of codes and scales, and the axis of its channels."""

    codes: fx.Node
    scale: fx.Node
    axis: int


def lower_int8(editor: Editor) -> int:
    """Replaces every quantized layer and every other quantizer; returns how many."""
    activations: dict[fx.Node, tuple[fx.Node, ...]] = {}
    count = 0
    for layer, plain in split_transposed(editor).items():
        editor.facts.setdefault(REPLACED, {})[layer] = plain
        count += 1
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        if matrix_product(node) is not None:
            count += _product(editor, node, activations)
        elif is_call(node, aten.embedding.default):
            count += _embedding(editor, node)
    for node in list(
        editor.graph.find_nodes(op="call_function", target=ours.fake_quantize.default)
    ):
        if node.users:
            count += _quantize_dequantize(editor, node)
    return count


def _stored(node: Any, *axes: int) -> Codes | None:
    """The int8 weight behind a dequantize node with one scale per index of one of `axes`."""
    if not is_call(node, ours.dequantize.default):
        return None
    codes, scale, zero_point, axis = node.args
    if zero_point is not None or codes.op != "get_attr" or scale.op != "get_attr":
        return None
    value = codes.meta["val"]
    fits = value.dtype == torch.int8 and value.dim() == 2 and scale.meta["val"].dim() == 1
    axis %= max(value.dim(), 1)
    return Codes(codes, scale, axis) if fits and axis in axes and is_float32(scale) else None


# ---- matrix products


def _product(editor: Editor, node: fx.Node, activations: dict[fx.Node, tuple[fx.Node, ...]]) -> int:
    kind = matrix_product(node)
    assert kind is not None
    is_linear = node.target is aten.linear.default
    x = node.args[kind.input]
    weight = _stored(node.args[kind.weight], 0 if is_linear else 1)
    if weight is None or node.kwargs or not is_float32(node) or len(sizes_of(node)) < 2:
        return 0
    if not is_call(x, ours.fake_quantize.default, ours.fake_quantize_dynamic.default):
        return 0
    assert isinstance(x, fx.Node)
    if x not in activations:
        activations[x] = _codes_of(editor, x)
    codes, scale, zero_point = activations[x]
    matrix = _as_columns(editor, weight.codes) if is_linear else weight.codes
    place = kind.bias
    bias = node.args[place] if place is not None and len(node.args) > place else None
    fused: fx.Node | None = None
    if isinstance(bias, fx.Node) and bias.op == "get_attr" and len(sizes_of(bias)) == 1:
        fused = bias
    # Sizes are read from the activation: the node itself is about to go.
    source = x.args[0]
    assert isinstance(source, fx.Node)
    leading = [size(editor, source, axis, node) for axis in range(len(sizes_of(source)) - 1)]
    shape = [*leading, int(node.meta["val"].shape[-1])]
    new = onnx_call(
        editor, "MatMulIntegerToFloat",
        [codes, matrix, scale, weight.scale, zero_point, None, fused],
        shape, before=node,
    )  # fmt: skip
    editor.facts.setdefault(REPLACED, {})[node.name] = new.name
    if bias is not None and fused is None:
        new = editor.call(aten.add.Tensor, new, bias, before=node)
    editor.replace(node, new)
    return 1


def _as_columns(editor: Editor, codes: fx.Node) -> fx.Node:
    """A linear's codes (out, in) as the kernel reads them, (in, out)."""
    name = f"{codes.target}.columns"
    if name not in editor.state:
        editor.add_state(name, editor.state[str(codes.target)].t().contiguous())
    return editor.get(name)


def _codes_of(editor: Editor, x: fx.Node) -> tuple[fx.Node, ...]:
    """Codes, scale and zero point of a quantized activation, made right where it is."""
    source = x.args[0]
    assert isinstance(source, fx.Node)
    found = _quantizer(editor, x, source)
    # For the check, which runs the program on the codes that the runtime finds.
    editor.facts.setdefault(TAPS, {})[x.name] = [node.name for node in found]
    return found


def _quantizer(editor: Editor, x: fx.Node, source: fx.Node) -> tuple[fx.Node, ...]:
    shape = [size(editor, source, axis, x) for axis in range(len(sizes_of(source)))]
    if is_call(x, ours.fake_quantize_dynamic.default):
        several = onnx_calls(
            editor, "DynamicQuantizeLinear", [source], [shape, [], []],
            before=x, values=_stand_ins(editor, source), domain="",
        )  # fmt: skip
        return tuple(editor.call(operator.getitem, several, i, before=x) for i in range(3))
    scale, zero_point = _parameters(editor, x)
    dtype = zero_point.meta["val"].dtype
    codes = onnx_call(
        editor, "QuantizeLinear", [source, scale, zero_point], shape,
        before=x, domain="", dtype=dtype,
    )  # fmt: skip
    return codes, scale, zero_point


def _stand_ins(editor: Editor, source: fx.Node) -> list[torch.Tensor]:
    """Codes, scale and zero point as fake tensors."""
    value = source.meta["val"]
    with torch.no_grad(), editor.fake_mode:
        return [
            torch.empty(value.shape, dtype=torch.uint8),
            torch.empty((), dtype=torch.float32),
            torch.empty((), dtype=torch.uint8),
        ]


def _parameters(editor: Editor, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Scale and zero point of a static quantizer as stored scalars, shared by equal ones."""
    _, scale, zero_point, low, _ = x.args
    kind = torch.uint8 if low >= 0 else torch.int8  # type: ignore[operator]
    found = []
    for name, tensor in (
        (f"scale.{scale!r}", torch.tensor(scale, dtype=torch.float32)),
        (f"zero_point.{zero_point}.{low}", torch.tensor(zero_point, dtype=kind)),
    ):
        key = "int8." + name.replace(".", "_")
        if key not in editor.state:
            editor.add_state(key, tensor)
        found.append(editor.get(key))
    return found[0], found[1]


# ---- the rest


def _quantize_dequantize(editor: Editor, x: fx.Node) -> int:
    """A Q/DQ pair, for the runtime to fuse with what is around it."""
    source, _, _, low, high = x.args
    if (low, high) not in ((0, 255), (-128, 127)) or not is_float32(x):
        return 0
    codes, scale, zero_point = _codes_of(editor, x)
    assert isinstance(source, fx.Node)
    shape = [size(editor, source, axis, x) for axis in range(len(sizes_of(source)))]
    value = onnx_call(
        editor, "DequantizeLinear", [codes, scale, zero_point], shape, before=x, domain=""
    )
    editor.replace(x, value)
    return 1


def _embedding(editor: Editor, node: fx.Node) -> int:
    """Rows are gathered as codes; each is multiplied by its own scale."""
    weight = _stored(node.args[0], 0)
    if weight is None:
        return 0
    ids = node.args[1]
    assert isinstance(ids, fx.Node)
    leading = [size(editor, ids, axis, node) for axis in range(len(sizes_of(ids)))]
    shape = [*leading, int(node.meta["val"].shape[-1])]
    rows = onnx_call(
        editor, "Gather", [weight.codes, ids], shape,
        before=node, domain="", dtype=torch.int8, axis=0,
    )  # fmt: skip
    scale = onnx_call(
        editor, "Gather", [weight.scale, ids], leading, before=node, domain="", axis=0
    )
    scale = editor.call(aten.unsqueeze.default, scale, -1, before=node)
    wide = editor.call(aten.to.dtype, rows, torch.float32, before=node)
    editor.replace(node, editor.call(aten.mul.Tensor, wide, scale, before=node))
    return 1
