"""Writing into slices, diagonals and along an axis: scatter, index_add, scatter_reduce and kin."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten
END = 2**63 - 1
REDUCTIONS = {
    "sum": "add", "mean": "add", "add": "add", "prod": "mul", "multiply": "mul",
    "amax": "max", "amin": "min",
}  # fmt: skip
"""Torch's name of a reduction to ONNX's."""


def _cut(e: Emitter, value: ir.Value, have: list[Any], want: list[Any]) -> ir.Value:
    """The front of every axis; torch ignores what a source has beyond its index."""
    axes = [i for i, (h, w) in enumerate(zip(have, want, strict=True)) if h != w]
    if not axes:
        return value
    ends = e.shape([want[i] for i in axes])
    return e.op("Slice", value, e.ints(*[0] * len(axes)), ends, e.ints(*axes))  # type: ignore[no-any-return]


def _updates(e: Emitter, source: Any, index: fx.Node, dtype: torch.dtype) -> ir.Value:
    if isinstance(source, fx.Node) and source.meta["val"].dim():
        return _cut(e, e.tensor(source, dtype), sizes_of(source), sizes_of(index))
    return e.op("Expand", e.tensor(source, dtype), e.shape(sizes_of(index)))  # type: ignore[no-any-return]


@translates(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def scatter(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any) -> Any:
    updates = _updates(e, source, index, node.meta["val"].dtype)
    kind = "add" if node.target is aten.scatter_add.default else "none"
    return e.op("ScatterElements", e.values[a], e.values[index], updates, axis=dim, reduction=kind)


@translates(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with(
    e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any, reduce: str
) -> Any:
    updates = _updates(e, source, index, node.meta["val"].dtype)
    return e.op(
        "ScatterElements", e.values[a], e.values[index], updates, axis=dim,
        reduction=REDUCTIONS[reduce],
    )  # fmt: skip


@translates(aten.scatter_reduce.two)
def scatter_reduce(
    e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any, reduce: str,
    include_self: bool = True,
) -> Any:  # fmt: skip
    dtype = node.meta["val"].dtype
    updates = _updates(e, source, index, dtype)
    return reduced_into(e, node, e.values[a], e.values[index], updates, dim, reduce, include_self)


def reduced_into(
    e: Emitter, node: fx.Node, base: ir.Value, index: ir.Value, updates: ir.Value, dim: int,
    reduce: str, include_self: bool,
) -> ir.Value:  # fmt: skip
    """`updates` reduced into `base` at `index`; without its own value where they touch it."""
    dtype = node.meta["val"].dtype

    def scattered(onto: ir.Value, value: ir.Value, kind: str) -> ir.Value:
        return e.op("ScatterElements", onto, index, value, axis=dim, reduction=kind)  # type: ignore[no-any-return]

    if not include_self:
        # What is touched starts at the reduction's neutral value.
        neutral = e.op("Expand", _neutral(e, reduce, dtype), e.op("Shape", index))
        base = scattered(base, neutral, "none")
    total = scattered(base, updates, REDUCTIONS[reduce])
    if reduce != "mean":
        return total
    if not dtype.is_floating_point:
        raise Untranslatable(node, "a mean of integers")
    one = e.constant(1.0, dtype)
    shape = e.op("Shape", index)
    ones = e.op("Expand", one, shape)
    count = e.op("Expand", one, e.op("Shape", base))
    if not include_self:
        count = scattered(count, e.op("Expand", e.constant(0.0, dtype), shape), "none")
    count = e.op("Max", scattered(count, ones, "add"), one)
    return e.op("Div", total, count)  # type: ignore[no-any-return]


def _neutral(e: Emitter, reduce: str, dtype: torch.dtype) -> ir.Value:
    bounds = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    lowest = float("-inf") if dtype.is_floating_point else bounds.min
    highest = float("inf") if dtype.is_floating_point else bounds.max
    value = {"prod": 1, "amax": lowest, "amin": highest}.get(reduce, 0)
    return e.constant(value, dtype)


def _along(e: Emitter, index: fx.Node, like: fx.Node, dim: int) -> ir.Value:
    """A 1-D index of one axis, repeated over the other axes of `like`."""
    rank = like.meta["val"].dim()
    shape = [1] * rank
    shape[dim] = -1
    column = e.op("Reshape", e.tensor(index, torch.int64), e.ints(*shape))
    return e.op("Expand", column, e.shape(sizes_of(like)))  # type: ignore[no-any-return]


@translates(aten.index_add.default)
def index_add(
    e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any, alpha: Any = 1
) -> Any:
    dtype = node.meta["val"].dtype
    if not node.meta["val"].dim():
        raise Untranslatable(node, "of a number")
    updates = e.tensor(source, dtype)
    if alpha != 1:
        updates = e.op("Mul", updates, e.tensor(alpha, dtype))
    where = _along(e, index, source, dim)
    return e.op("ScatterElements", e.values[a], where, updates, axis=dim, reduction="add")


@translates(aten.index_copy.default)
def index_copy(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any) -> Any:
    if not node.meta["val"].dim():
        raise Untranslatable(node, "of a number")
    where = _along(e, index, source, dim)
    return e.op("ScatterElements", e.values[a], where, e.values[source], axis=dim)


@translates(aten.index_reduce.default)
def index_reduce(
    e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any, reduce: str, *,
    include_self: bool = True,
) -> Any:  # fmt: skip
    where = _along(e, index, source, dim)
    return reduced_into(e, node, e.values[a], where, e.values[source], dim, reduce, include_self)


@translates(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, value: Any) -> Any:
    dtype = node.meta["val"].dtype
    sizes = sizes_of(a)
    axis = dim % len(sizes)
    count = index.meta["val"].shape[0] if index.meta["val"].dim() else 1
    shape = [1] * len(sizes)
    shape[axis] = -1
    column = e.op("Reshape", e.tensor(index, torch.int64), e.ints(*shape))
    want = e.shape([*sizes[:axis], count, *sizes[axis + 1 :]])
    where = e.op("Expand", column, want)
    updates = e.op("Expand", e.tensor(value, dtype), want)
    return e.op("ScatterElements", e.values[a], where, updates, axis=axis)


@translates(aten.masked_scatter.default)
def masked_scatter(e: Emitter, node: fx.Node, a: Any, mask: Any, source: Any) -> Any:
    shape = e.shape(sizes_of(node))
    chosen = e.op("Expand", e.tensor(mask, torch.bool), shape)
    flat = e.op("Reshape", e.cast(chosen, torch.bool, torch.int64), e.ints(-1))
    # The n-th true place takes the n-th value.
    order = e.op("Sub", e.op("CumSum", flat, e.constant(0, torch.int64)), e.ints(1))
    order = e.op("Max", order, e.ints(0))
    values = e.op("Reshape", e.values[source], e.ints(-1))
    taken = e.op("Reshape", e.op("Gather", values, order), shape)
    return e.op("Where", chosen, taken, e.op("Expand", e.values[a], shape))


# ---- slices and diagonals


@translates(aten.slice_scatter.default)
def slice_scatter(
    e: Emitter, node: fx.Node, a: Any, source: Any, dim: int = 0, start: Any = None,
    end: Any = None, step: int = 1,
) -> Any:  # fmt: skip
    axis = dim % node.meta["val"].dim()
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    places = e.op("Range", zero, e.op("Squeeze", e.size(a.meta["val"].shape[axis])), one)
    begin = e.ints(0) if start is None else e.index(start)
    stop = e.ints(END) if end is None else e.index(end)
    places = e.op("Slice", places, begin, stop, e.ints(0), e.ints(step))
    shape = [1] * node.meta["val"].dim()
    shape[axis] = -1
    column = e.op("Reshape", places, e.ints(*shape))
    where = e.op("Expand", column, e.shape(sizes_of(source)))
    updates = e.tensor(source, node.meta["val"].dtype)
    return e.op("ScatterElements", e.values[a], where, updates, axis=axis)


@translates(aten.select_scatter.default)
def select_scatter(e: Emitter, node: fx.Node, a: Any, source: Any, dim: int, index: Any) -> Any:
    axis = dim % node.meta["val"].dim()
    updates = e.op("Unsqueeze", e.tensor(source, node.meta["val"].dtype), e.ints(axis))
    sizes = sizes_of(a)
    sizes[axis] = 1
    where = e.op("Expand", e.index(index), e.shape(sizes))
    return e.op("ScatterElements", e.values[a], where, updates, axis=axis)


def _diagonal_places(e: Emitter, rows: Any, columns: Any, count: Any, offset: int) -> ir.Value:
    """Places of a diagonal in a matrix that is laid out row by row."""
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    steps = e.op("Range", zero, e.op("Squeeze", e.size(count)), one)
    stride = e.op("Add", e.size(columns), e.ints(1))
    places = e.op("Mul", steps, stride)
    if offset >= 0:
        return e.op("Add", places, e.ints(offset))  # type: ignore[no-any-return]
    return e.op("Add", places, e.op("Mul", e.size(columns), e.ints(-offset)))  # type: ignore[no-any-return]


def _flat_matrices(
    e: Emitter, a: fx.Node, dim1: int, dim2: int
) -> tuple[ir.Value, list[int], list[Any]]:
    """The tensor with two axes at the end and joined, the order of its axes, its sizes in it."""
    sizes = sizes_of(a)
    rank = len(sizes)
    first, second = dim1 % rank, dim2 % rank
    order = [*(i for i in range(rank) if i not in (first, second)), first, second]
    moved = e.op("Transpose", e.values[a], perm=order)
    joined = e.op("Reshape", moved, e.shape([*[0] * (rank - 2), -1]))
    return joined, order, [sizes[i] for i in order]


@translates(aten.diagonal.default)
def diagonal(
    e: Emitter, node: fx.Node, a: Any, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Any:
    joined, _, sizes = _flat_matrices(e, a, dim1, dim2)
    count = node.meta["val"].shape[-1]
    places = _diagonal_places(e, *_numbers(a, dim1, dim2), count, offset)
    assert len(sizes) >= 2
    return e.op("Gather", joined, places, axis=-1)


@translates(aten.diagonal_scatter.default)
def diagonal_scatter(
    e: Emitter, node: fx.Node, a: Any, source: Any, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Any:
    joined, order, sizes = _flat_matrices(e, a, dim1, dim2)
    count = source.meta["val"].shape[-1]
    places = _diagonal_places(e, *_numbers(a, dim1, dim2), count, offset)
    where = e.op("Expand", places, e.shape(sizes_of(source)))
    updates = e.tensor(source, node.meta["val"].dtype)
    written = e.op("ScatterElements", joined, where, updates, axis=-1)
    back = e.op("Reshape", written, e.shape(sizes))
    return e.op("Transpose", back, perm=[order.index(i) for i in range(len(order))])


def _numbers(a: fx.Node, dim1: int, dim2: int) -> tuple[Any, Any]:
    shape = a.meta["val"].shape
    return shape[dim1], shape[dim2]


@translates(aten.as_strided.default)
def as_strided(
    e: Emitter, node: fx.Node, a: Any, size: list[Any], stride: list[Any], offset: Any = None
) -> Any:
    if not a.meta["val"].is_contiguous():
        raise Untranslatable(node, "strides of a tensor that is not laid out row by row")
    places = e.ints(0) if offset is None else e.index(offset)
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    for axis, (count, step) in enumerate(zip(size, stride, strict=True)):
        steps = e.op("Range", zero, e.op("Squeeze", e.index(count)), one)
        steps = e.op("Mul", steps, e.index(step))
        shape = [1] * len(size)
        shape[axis] = -1
        places = e.op("Add", places, e.op("Reshape", steps, e.ints(*shape)))
    return e.op("Gather", e.op("Reshape", e.values[a], e.ints(-1)), places)
