"""Pooling, over windows and to a given number of cells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten import translates
from graphwright.backends.onnxruntime.aten.layers import spread
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


@translates(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    e: Emitter, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Any:  # fmt: skip
    rank = x.meta["val"].dim() - 2
    kernel = spread(kernel, rank)
    return e.op(
        "MaxPool", e.values[x], kernel_shape=kernel,
        strides=spread(stride, rank) if stride else kernel, pads=spread(padding, rank) * 2,
        dilations=spread(dilation, rank), ceil_mode=int(ceil_mode),
    )  # fmt: skip


@translates(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    e: Emitter, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    if divisor_override is not None:
        raise Untranslatable(node, "divisor_override")
    rank = x.meta["val"].dim() - 2
    kernel = spread(kernel, rank)
    return e.op(
        "AveragePool", e.values[x], kernel_shape=kernel,
        strides=spread(stride, rank) if stride else kernel, pads=spread(padding, rank) * 2,
        ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
    )  # fmt: skip


@translates(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
def adaptive_avg_pool(e: Emitter, node: fx.Node, x: Any, output_size: Any) -> Any:
    have, want = sizes_of(x)[2:], sizes_of(node)[2:]
    axes = list(range(2, 2 + len(have)))
    if all(w == 1 for w in want):
        return e.op("ReduceMean", e.values[x], e.ints(*axes), keepdims=1)
    if have == want:
        return e.values[x]
    if not all(isinstance(s, int) for s in [*have, *want]):
        raise Untranslatable(node, "adaptive pooling of a dynamic size")
    if all(h % w == 0 for h, w in zip(have, want, strict=True)):
        kernel = [h // w for h, w in zip(have, want, strict=True)]
        return e.op("AveragePool", e.values[x], kernel_shape=kernel, strides=kernel)
    if len(have) != 2:
        raise Untranslatable(node, "uneven adaptive pooling")
    dtype = node.meta["val"].dtype
    rows = e.constant(_bins(have[0], want[0]), dtype)
    columns = e.op("Transpose", e.constant(_bins(have[1], want[1]), dtype), perm=[1, 0])
    return e.op("MatMul", e.op("MatMul", rows, e.values[x]), columns)


def _bins(size: int, out: int) -> list[list[float]]:
    """The averaging matrix (out, size) of uneven adaptive pooling along one axis."""
    matrix = torch.zeros(out, size)
    for i in range(out):
        low, high = i * size // out, math.ceil((i + 1) * size / out)
        matrix[i, low:high] = 1 / (high - low)
    return matrix.tolist()
