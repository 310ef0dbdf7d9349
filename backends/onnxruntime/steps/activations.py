"""Activation steps: tanh GELU and SiLU spelled out, and a linear's bias into its GELU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.biases import bare, bias_of
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
    is_call,
    is_float32,
    onnx_call,
    size,
)
from graphwright.ir.edit import Editor

aten = torch.ops.aten
ADD = (aten.add.Tensor, aten.add.Scalar)
MUL = (aten.mul.Tensor, aten.mul.Scalar)


def find_gelu(editor: Editor) -> int:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written out, becomes `aten.gelu`."""
    count = 0
    for node in list(editor.graph.find_nodes(op="call_function", target=aten.tanh.default)):
        x = _cubic_argument(node.args[0])
        if x is None:
            continue
        last = _half_times(node, x)
        if last is not None and is_float32(last):
            new = editor.call(aten.gelu.default, x, approximate="tanh", before=last)
            editor.replace(last, new)
            count += 1
    return count


def _with_number(node: Any, targets: tuple[Any, ...], number: float) -> fx.Node | None:
    """The other operand of a call of one of `targets` with this number."""
    if not is_call(node, *targets) or len(node.args) < 2 or node.kwargs:
        return None
    for number_at, other in ((1, 0), (0, 1)):
        given = node.args[number_at]
        if isinstance(given, float | int) and math.isclose(given, number, rel_tol=1e-6):
            found = node.args[other]
            return found if isinstance(found, fx.Node) else None
    return None


def _cubic_argument(node: Any) -> fx.Node | None:
    inner = _with_number(node, MUL, math.sqrt(2 / math.pi))
    if inner is None or not is_call(inner, aten.add.Tensor) or inner.kwargs:
        return None
    for x, cubic in (inner.args[:2], inner.args[1::-1]):
        power = _with_number(cubic, MUL, 0.044715)
        if power is not None and is_call(power, aten.pow.Tensor_Scalar):
            base, exponent = power.args
            if base is x and exponent in (3, 3.0):
                return x  # type: ignore[return-value]
    return None


def _half_times(tanh: fx.Node, x: fx.Node) -> fx.Node | None:
    """The product (0.5 x) * (1 + tanh) that reads this tanh."""
    for shifted in tanh.users:
        if _with_number(shifted, ADD, 1.0) is not tanh:
            continue
        for product in shifted.users:
            if not is_call(product, aten.mul.Tensor):
                continue
            other = product.args[0] if product.args[1] is shifted else product.args[1]
            if _with_number(other, MUL, 0.5) is x:
                return product
    return None


def find_silu(editor: Editor) -> int:
    """x * sigmoid(x) becomes `aten.silu`; x * sigmoid(1.702 x) becomes QuickGelu."""
    count = 0
    for node in list(editor.graph.find_nodes(op="call_function", target=aten.sigmoid.default)):
        source = node.args[0]
        for product in list(node.users):
            if not is_call(product, aten.mul.Tensor) or not is_float32(product):
                continue
            x: Any = product.args[0] if product.args[1] is node else product.args[1]
            if source is x:
                editor.replace(product, editor.call(aten.silu.default, x, before=product))
                count += 1
            elif isinstance(x, fx.Node) and _with_number(source, MUL, 1.702) is x:
                shape = [size(editor, x, i, product) for i in range(len(sizes_of(x)))]
                fused = onnx_call(
                    editor, "QuickGelu", [x], shape, before=product, alpha=1.702,
                    value=product.meta["val"],
                )  # fmt: skip
                editor.replace(product, fused)
                count += 1
    return count


def fuse_bias_gelu(editor: Editor) -> int:
    """gelu(x W + b) becomes BiasGelu or FastGelu over the bare product."""
    count = 0
    for node in list(editor.graph.find_nodes(op="call_function", target=aten.gelu.default)):
        linear = node.args[0]
        bias = bias_of(linear)
        if bias is None or not isinstance(linear, fx.Node) or not is_float32(node):
            continue
        is_tanh = argument(node, 1, "approximate", "none") == "tanh"
        product = bare(editor, linear)
        shape = [size(editor, product, i, node) for i in range(len(sizes_of(product)))]
        kind = "FastGelu" if is_tanh else "BiasGelu"
        value = node.meta["val"]
        fused = onnx_call(editor, kind, [product, bias], shape, before=node, value=value)
        editor.replace(node, fused)
        count += 1
    return count
