"""Windows over an axis, differences along one, and weight normalization."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.convolutions import spread
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, expression, sizes_of

aten = torch.ops.aten
END = 2**63 - 1


def places(e: Emitter, count: Any, step: int, width: int, spacing: int = 1) -> ir.Value:
    """(count, width) int64: start of each window along an axis plus the offsets within it."""
    offsets = [i * spacing for i in range(width)]
    size = expression(count)
    if isinstance(size, int):
        rows = [[i * step + offset for offset in offsets] for i in range(size)]
        return e.constant(rows, torch.int64)
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    starts = e.op("Range", zero, e.op("Squeeze", e.size(count)), one)
    starts = e.op("Unsqueeze", e.op("Mul", starts, e.ints(step)), e.ints(1))
    return e.op("Add", starts, e.constant([offsets], torch.int64))  # type: ignore[no-any-return]


@translates(aten.unfold.default)
def unfold(e: Emitter, node: fx.Node, a: Any, dimension: int, size: int, step: int) -> Any:
    rank = a.meta["val"].dim()
    axis = dimension % rank
    count = node.meta["val"].shape[axis]
    picked = e.op("Gather", e.values[a], places(e, count, step, size), axis=axis)
    order = [i for i in range(rank + 1) if i != axis + 1]
    return e.op("Transpose", picked, perm=[*order, axis + 1])


@translates(aten.im2col.default)
def im2col(
    e: Emitter, node: fx.Node, a: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> Any:
    kernel, dilation, padding, stride = (spread(v, 2) for v in (kernel, dilation, padding, stride))
    fake = a.meta["val"]
    if fake.dim() != 4:
        raise Untranslatable(node, "im2col without a batch axis")
    value = e.values[a]
    if any(padding):
        pads = e.ints(0, 0, *padding, 0, 0, *padding)
        value = e.op("Pad", value, pads, mode="constant")
    counts = [
        (fake.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    for i, axis in ((0, 2), (1, 4)):
        windows = places(e, counts[i], stride[i], kernel[i], dilation[i])
        value = e.op("Gather", value, windows, axis=axis)
    # (batch, channels, rows, kernel rows, columns, kernel columns)
    value = e.op("Transpose", value, perm=[0, 1, 3, 5, 2, 4])
    channels = int(fake.shape[1]) * kernel[0] * kernel[1]
    return e.op("Reshape", value, e.shape([fake.shape[0], channels, counts[0] * counts[1]]))


@translates(aten.diff.default)
def diff(
    e: Emitter, node: fx.Node, a: Any, n: int = 1, dim: int = -1, prepend: Any = None,
    append: Any = None,
) -> Any:  # fmt: skip
    fake = a.meta["val"]
    axis = dim % fake.dim()
    parts = [p for p in (prepend, a, append) if p is not None]
    value = e.values[a]
    if len(parts) > 1:
        value = e.op("Concat", *[e.tensor(p, fake.dtype) for p in parts], axis=axis)
    if fake.dtype == torch.bool:
        raise Untranslatable(node, "differences of booleans")
    for _ in range(n):
        later = e.op("Slice", value, e.ints(1), e.ints(END), e.ints(axis))
        sooner = e.op("Slice", value, e.ints(0), e.ints(-1), e.ints(axis))
        value = e.op("Sub", later, sooner)
    return value


@translates(aten._weight_norm.default)
def weight_norm(e: Emitter, node: fx.Node, v: Any, g: Any, dim: int = 0) -> Any:
    rank = len(sizes_of(v))
    axes = [i for i in range(rank) if dim == -1 or i != dim % rank]
    length = e.op("ReduceL2", e.values[v], e.ints(*axes), keepdims=1)
    return e.op("Mul", e.values[v], e.op("Div", e.values[g], length))
