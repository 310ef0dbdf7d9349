"""Tensors made from sizes and numbers: zeros, arange, eye, linspace, meshgrid."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import (
    Emitter,
    Untranslatable,
    expression,
    onnx_dtype,
    sizes_of,
)

aten = torch.ops.aten


def filled(e: Emitter, node: fx.Node, value: Any) -> Any:
    """A tensor of one repeated number, in the node's shape."""
    want, dtype = sizes_of(node), node.meta["val"].dtype
    if isinstance(value, fx.Node):
        return e.op("Expand", e.tensor(value, dtype), e.shape(want))
    if not want:
        return e.constant(value, dtype)
    one = ir.tensor([value], dtype=onnx_dtype(dtype))
    return e.op("ConstantOfShape", e.shape(want), value=one)


@translates(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
            aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)  # fmt: skip
def zeros(e: Emitter, node: fx.Node, *_: Any, **__: Any) -> Any:
    return filled(e, node, 0)


@translates(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(e: Emitter, node: fx.Node, *_: Any, **__: Any) -> Any:
    return filled(e, node, 1)


@translates(aten.full.default, aten.full_like.default, aten.new_full.default)
def full(e: Emitter, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    at = 2 if node.target is aten.new_full.default else 1
    return filled(e, node, args[at] if len(args) > at else kwargs["fill_value"])


@translates(aten.fill.Scalar, aten.fill.Tensor)
def fill(e: Emitter, node: fx.Node, a: Any, value: Any) -> Any:
    return filled(e, node, value)


@translates(aten.scalar_tensor.default)
def scalar_tensor(e: Emitter, node: fx.Node, value: Any, **_: Any) -> Any:
    return e.tensor(value, node.meta["val"].dtype)


@translates(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(e: Emitter, node: fx.Node, *args: Any, **_: Any) -> Any:
    dtype = node.meta["val"].dtype
    start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    if not dtype.is_floating_point:
        return e.op("Range", e.tensor(start, dtype), e.tensor(end, dtype), e.tensor(step, dtype))
    # Counted in whole numbers: how many there are must not hang on float32.
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    steps = e.op("Range", zero, e.op("Squeeze", e.size(node.meta["val"].shape[0])), one)
    wide = e.cast(steps, torch.int64, torch.float64)
    wide = e.op("Mul", wide, e.tensor(step, torch.float64))
    wide = e.op("Add", wide, e.tensor(start, torch.float64))
    return e.cast(wide, torch.float64, dtype)


@translates(aten.eye.default, aten.eye.m)
def eye(e: Emitter, node: fx.Node, *_: Any, **__: Any) -> Any:
    dtype = onnx_dtype(node.meta["val"].dtype)
    return e.op("EyeLike", filled(e, node, 0), dtype=int(dtype))


@translates(aten.linspace.default)
def linspace(e: Emitter, node: fx.Node, start: Any, end: Any, steps: Any, **_: Any) -> Any:
    if not all(isinstance(v, int | float) for v in (start, end, steps)):
        raise Untranslatable(node, "dynamic ends")
    dtype = node.meta["val"].dtype
    return e.constant(torch.linspace(start, end, steps, dtype=dtype).tolist(), dtype)


@translates(aten.meshgrid.indexing)
def meshgrid(e: Emitter, node: fx.Node, tensors: list[Any], indexing: str = "ij") -> Any:
    outs = []
    want = [expression(s) for s in node.meta["val"][0].shape]
    for i, tensor in enumerate(tensors):
        axis = {0: 1, 1: 0}.get(i, i) if indexing == "xy" else i
        shape = [1] * len(tensors)
        shape[axis] = -1
        column = e.op("Reshape", e.values[tensor], e.ints(*shape))
        outs.append(e.op("Expand", column, e.shape(want)))
    return outs
