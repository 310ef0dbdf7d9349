"""Pooling, over windows and to a given number of cells."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten import translates
from graphwright.backends.onnxruntime.aten.layers import spread
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


def _batched(e: Emitter, x: fx.Node, rank: int) -> tuple[ir.Value, bool]:
    """The input with a batch axis, and whether that was added."""
    missing = x.meta["val"].dim() == rank + 1
    return (e.op("Unsqueeze", e.values[x], e.ints(0)) if missing else e.values[x]), missing


def _rank(node: fx.Node) -> int:
    """Number of axes that an operator pools, as its name ends: `max_pool2d`."""
    return int(str(node.target).split(".")[1].removesuffix("_with_indices")[-2])


@translates(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    e: Emitter, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Any:  # fmt: skip
    rank = _rank(node)
    kernel = spread(kernel, rank)
    value, added = _batched(e, x, rank)
    pooled = e.op(
        "MaxPool", value, kernel_shape=kernel,
        strides=spread(stride, rank) if stride else kernel, pads=spread(padding, rank) * 2,
        dilations=spread(dilation, rank), ceil_mode=int(ceil_mode),
    )  # fmt: skip
    return e.op("Squeeze", pooled, e.ints(0)) if added else pooled


@translates(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    e: Emitter, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    rank = _rank(node)
    kernel = spread(kernel, rank)
    value, added = _batched(e, x, rank)
    if divisor_override is not None:
        if ceil_mode:
            raise Untranslatable(node, "divisor_override in ceil mode")
        # Every window then divides by its whole size, and is brought to the other divisor.
        count_include_pad = True
    pooled = e.op(
        "AveragePool", value, kernel_shape=kernel,
        strides=spread(stride, rank) if stride else kernel, pads=spread(padding, rank) * 2,
        ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
    )  # fmt: skip
    if divisor_override is not None:
        factor = e.constant(math.prod(kernel) / divisor_override, node.meta["val"].dtype)
        pooled = e.op("Mul", pooled, factor)
    return e.op("Squeeze", pooled, e.ints(0)) if added else pooled


@translates(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def adaptive_avg_pool(e: Emitter, node: fx.Node, x: Any, output_size: Any) -> Any:
    rank = _rank(node)
    have, want = sizes_of(x)[-rank:], sizes_of(node)[-rank:]
    first = x.meta["val"].dim() - rank
    if have == want:
        return e.values[x]
    if all(w == 1 for w in want):
        return e.op("ReduceMean", e.values[x], e.ints(*range(first, first + rank)), keepdims=1)
    fixed = all(isinstance(s, int) for s in [*have, *want])
    if fixed and first == 2 and all(h % w == 0 for h, w in zip(have, want, strict=True)):
        kernel = [h // w for h, w in zip(have, want, strict=True)]
        return e.op("AveragePool", e.values[x], kernel_shape=kernel, strides=kernel)
    value = e.values[x]
    for axis in range(rank):
        if have[axis] != want[axis]:
            weights = cell_weights(e, have[axis], want[axis], node.meta["val"].dtype)
            value = _along(e, weights, value, first + axis, first + rank)
    return value


def _along(e: Emitter, matrix: ir.Value, value: ir.Value, axis: int, rank: int) -> ir.Value:
    """The product of a matrix (cells, size) with one axis of a tensor."""
    if axis == rank - 2:
        return e.op("MatMul", matrix, value)  # type: ignore[no-any-return]
    turned = e.op("Transpose", matrix, perm=[1, 0])
    if axis == rank - 1:
        return e.op("MatMul", value, turned)  # type: ignore[no-any-return]
    order = [*(i for i in range(rank) if i != axis), axis]
    moved = e.op("MatMul", e.op("Transpose", value, perm=order), turned)
    return e.op("Transpose", moved, perm=[order.index(i) for i in range(rank)])  # type: ignore[no-any-return]


def cell_bounds(e: Emitter, size: Any, cells: Any) -> tuple[ir.Value, ir.Value]:
    """(cells, 1) int64 each: where every cell of adaptive pooling begins, and where it ends.

    Cell i covers floor(i * size / cells) to ceil((i + 1) * size / cells).
    """
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    count, length = _value(e, cells), _value(e, size)
    places = e.op("Range", zero, e.op("Squeeze", count), one)
    places = e.op("Unsqueeze", places, e.ints(1))
    begins = e.op("Div", e.op("Mul", places, length), count)
    reach = e.op("Mul", e.op("Add", places, e.ints(1)), length)
    ends = e.op("Div", e.op("Sub", e.op("Add", reach, count), e.ints(1)), count)
    return begins, ends


def _value(e: Emitter, size: Any) -> ir.Value:
    return e.ints(size) if isinstance(size, int) else e.size_of(size)


def cell_members(e: Emitter, size: Any, cells: Any) -> ir.Value:
    """(cells, size) booleans: which places of an axis belong to which cell."""
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    begins, ends = cell_bounds(e, size, cells)
    columns = e.op("Range", zero, e.op("Squeeze", _value(e, size)), one)
    inside = e.op("GreaterOrEqual", columns, begins)
    return e.op("And", inside, e.op("Less", columns, ends))  # type: ignore[no-any-return]


def cell_weights(e: Emitter, size: Any, cells: Any, dtype: torch.dtype) -> ir.Value:
    """The averaging matrix (cells, size) of adaptive pooling along one axis."""
    if isinstance(size, int) and isinstance(cells, int):
        return e.constant(_fixed_weights(size, cells), dtype)
    begins, ends = cell_bounds(e, size, cells)
    width = e.cast(e.op("Sub", ends, begins), torch.int64, dtype)
    members = e.cast(cell_members(e, size, cells), torch.bool, dtype)
    return e.op("Div", members, width)  # type: ignore[no-any-return]


def _fixed_weights(size: int, cells: int) -> list[list[float]]:
    matrix = torch.zeros(cells, size, dtype=torch.float64)
    for i in range(cells):
        low, high = i * size // cells, math.ceil((i + 1) * size / cells)
        matrix[i, low:high] = 1 / (high - low)
    return matrix.tolist()
