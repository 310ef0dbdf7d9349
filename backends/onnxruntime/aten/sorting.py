"""Sorting and what comes down to it; of equal values the first one comes first.

Torch leaves the order of equal values open unless a sort is stable; ONNX's TopK is stable, so the
translations are right for both.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


def sorted_by_topk(
    e: Emitter, a: fx.Node, count: ir.Value, dim: int, largest: bool
) -> list[ir.Value]:
    """The first `count` values along an axis and their places, in order."""
    value, dtype = e.values[a], a.meta["val"].dtype
    if not a.meta["val"].dim():
        return [value, e.constant(0, torch.int64)]
    narrow = dtype in (torch.bool, torch.uint8, torch.int8, torch.int16)
    if narrow:  # TopK has no kernels for these
        value = e.cast(value, dtype, torch.int32)
    found, places = e.multi("TopK", 2, value, count, axis=dim, largest=int(largest), sorted=1)
    return [e.cast(found, torch.int32, dtype) if narrow else found, places]


@translates(aten.topk.default)
def topk(
    e: Emitter, node: fx.Node, a: Any, k: Any, dim: int = -1, largest: bool = True,
    sorted: bool = True,
) -> Any:  # fmt: skip
    return sorted_by_topk(e, a, e.index(k), dim, largest)


def _sorted(e: Emitter, a: fx.Node, dim: int, descending: bool) -> list[ir.Value]:
    sizes = a.meta["val"].shape
    count = e.size(sizes[dim]) if sizes else e.ints(1)
    return sorted_by_topk(e, a, count, dim, descending)


@translates(aten.sort.default)
def sort(e: Emitter, node: fx.Node, a: Any, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(e, a, dim, descending)


@translates(aten.sort.stable)
def sort_stable(
    e: Emitter, node: fx.Node, a: Any, *, stable: Any = None, dim: int = -1,
    descending: bool = False,
) -> Any:  # fmt: skip
    return _sorted(e, a, dim, descending)


@translates(aten.argsort.default)
def argsort(e: Emitter, node: fx.Node, a: Any, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(e, a, dim, descending)[1]


@translates(aten.argsort.stable)
def argsort_stable(
    e: Emitter, node: fx.Node, a: Any, *, stable: bool, dim: int = -1, descending: bool = False
) -> Any:
    return _sorted(e, a, dim, descending)[1]


@translates(aten.msort.default)
def msort(e: Emitter, node: fx.Node, a: Any) -> Any:
    return _sorted(e, a, 0, False)[0]


def _nth(e: Emitter, a: fx.Node, count: ir.Value, dim: int, keepdim: bool) -> list[ir.Value]:
    """The `count`-th smallest value along an axis, and its place."""
    found = sorted_by_topk(e, a, count, dim, largest=False)
    if not a.meta["val"].dim():
        return found
    last = [e.op("Slice", part, e.ints(-1), e.ints(2**63 - 1), e.ints(dim)) for part in found]
    return last if keepdim else [e.op("Squeeze", part, e.ints(dim)) for part in last]


@translates(aten.kthvalue.default)
def kthvalue(
    e: Emitter, node: fx.Node, a: Any, k: Any, dim: int = -1, keepdim: bool = False
) -> Any:
    return _nth(e, a, e.index(k), dim, keepdim)


def _middle(e: Emitter, size: Any) -> ir.Value:
    """The lower of the two middle places, counted from one: (n + 1) // 2."""
    return e.op("Div", e.op("Add", e.size(size), e.ints(1)), e.ints(2))  # type: ignore[no-any-return]


@translates(aten.median.dim)
def median(e: Emitter, node: fx.Node, a: Any, dim: int, keepdim: bool = False) -> Any:
    sizes = a.meta["val"].shape
    if not sizes:
        return [e.values[a], e.constant(0, torch.int64)]
    value, place = _nth(e, a, _middle(e, sizes[dim]), dim, keepdim)
    return [_or_nan(e, a, value, dim, keepdim), place]


@translates(aten.median.default)
def median_of_all(e: Emitter, node: fx.Node, a: Any) -> Any:
    flat = e.op("Reshape", e.values[a], e.ints(-1))
    count = e.ints(1)
    for size in sizes_of(a):
        count = e.op("Mul", count, e.size_of(size) if not isinstance(size, int) else e.ints(size))
    middle = e.op("Div", e.op("Add", count, e.ints(1)), e.ints(2))
    found, _ = e.multi("TopK", 2, flat, middle, axis=0, largest=0, sorted=1)
    value = e.op("Squeeze", e.op("Slice", found, e.ints(-1), e.ints(2**63 - 1), e.ints(0)))
    return _or_nan(e, a, value, None, False)


def _or_nan(e: Emitter, a: fx.Node, value: ir.Value, dim: int | None, keepdim: bool) -> ir.Value:
    """The value, or NaN where there is one among those it was chosen from."""
    dtype = a.meta["val"].dtype
    if not dtype.is_floating_point:
        return value
    nans = e.cast(e.op("IsNaN", e.values[a]), torch.bool, torch.int32)
    axes = None if dim is None else e.ints(dim)
    broken = e.op("ReduceMax", nans, axes, keepdims=int(keepdim))
    broken = e.cast(broken, torch.int32, torch.bool)
    return e.op("Where", broken, e.constant(float("nan"), dtype), value)  # type: ignore[no-any-return]


# ---- counting


@translates(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(
    e: Emitter, node: fx.Node, boundaries: Any, value: Any, *, out_int32: bool = False,
    right: bool = False, side: Any = None, sorter: Any = None,
) -> Any:  # fmt: skip
    if sorter is not None:
        raise Untranslatable(node, "with a sorter")
    return places_among(e, node, boundaries, value, right or side == "right")


@translates(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(
    e: Emitter, node: fx.Node, value: Any, boundaries: Any, *, out_int32: bool = False,
    right: bool = False,
) -> Any:  # fmt: skip
    return places_among(e, node, boundaries, value, right)


def places_among(
    e: Emitter, node: fx.Node, boundaries: fx.Node, value: Any, right: bool
) -> ir.Value:
    """The number of boundaries below each value (or equal to it, with `right`)."""
    dtype = boundaries.meta["val"].dtype
    if isinstance(value, fx.Node):
        dtype = torch.promote_types(dtype, value.meta["val"].dtype)
    steps = e.op("Unsqueeze", e.tensor(boundaries, dtype), e.ints(-2))
    if boundaries.meta["val"].dim() == 1:
        steps = e.tensor(boundaries, dtype)
    asked = e.op("Unsqueeze", e.tensor(value, dtype), e.ints(-1))
    below = e.op("LessOrEqual" if right else "Less", steps, asked)
    count = e.op("ReduceSum", e.cast(below, torch.bool, torch.int64), e.ints(-1), keepdims=0)
    return e.cast(count, torch.int64, node.meta["val"].dtype)


@translates(aten.bincount.default)
def bincount(e: Emitter, node: fx.Node, a: Any, weights: Any = None, minlength: Any = 0) -> Any:
    dtype = node.meta["val"].dtype
    values = e.tensor(a, torch.int64)
    # With -1 in front, which is the largest of nothing.
    largest = e.op("ReduceMax", e.op("Concat", e.ints(-1), values, axis=0), keepdims=1)
    length = e.op("Max", e.op("Add", largest, e.ints(1)), e.index(minlength))
    start = e.op("Expand", e.constant(0, dtype), length)
    if weights is None:
        counted = e.op("Expand", e.constant(1, dtype), e.op("Shape", values))
    else:
        counted = e.tensor(weights, dtype)
    return e.op("ScatterElements", start, values, counted, axis=0, reduction="add")


@translates(aten._unique2.default)
def unique(
    e: Emitter, node: fx.Node, a: Any, sorted: bool = True, return_inverse: bool = False,
    return_counts: bool = False,
) -> Any:  # fmt: skip
    dtype = a.meta["val"].dtype
    work = torch.int64 if dtype == torch.bool else dtype
    found, _, inverse, counts = e.multi("Unique", 4, e.tensor(a, work), sorted=1)
    shaped = e.op("Reshape", inverse, e.shape(sizes_of(a)))
    return [e.cast(found, work, dtype), shaped, counts]


@translates(aten.repeat_interleave.self_Tensor)
def repeat_interleave(
    e: Emitter, node: fx.Node, a: Any, repeats: Any, dim: Any = None, *, output_size: Any = None
) -> Any:
    value, axis = e.values[a], dim
    if dim is None:
        value, axis = e.op("Reshape", value, e.ints(-1)), 0
    size = e.op("Gather", e.op("Shape", value), e.ints(axis), axis=0)
    counts = e.op("Expand", e.tensor(repeats, torch.int64), size)
    ends = e.op("CumSum", counts, e.constant(0, torch.int64))
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    total = e.op("ReduceSum", counts, keepdims=0)
    places = e.op("Range", zero, total, one)
    # A result at place p comes from the first element whose copies end behind p.
    passed = e.op("LessOrEqual", ends, e.op("Unsqueeze", places, e.ints(-1)))
    # The axis is kept and squeezed: ONNX Runtime does not drop one of an empty tensor.
    count = e.op("ReduceSum", e.cast(passed, torch.bool, torch.int64), e.ints(-1), keepdims=1)
    return e.op("Gather", value, e.op("Squeeze", count, e.ints(-1)), axis=axis)


@translates(aten.quantile.scalar, aten.quantile.default)
def quantile(
    e: Emitter, node: fx.Node, a: Any, q: Any, dim: Any = None, keepdim: bool = False, *,
    interpolation: str = "linear",
) -> Any:  # fmt: skip
    if interpolation != "linear" or (isinstance(q, fx.Node) and q.meta["val"].dim()):
        raise Untranslatable(node, "several quantiles, or another interpolation")
    dtype, rank = node.meta["val"].dtype, a.meta["val"].dim()
    value, axis = e.values[a], dim
    if dim is None:
        value, axis = e.op("Reshape", value, e.ints(-1)), 0
    size = e.op("Gather", e.op("Shape", value), e.ints(axis), axis=0)
    ordered, _ = e.multi("TopK", 2, value, size, axis=axis, largest=0, sorted=1)
    last = e.cast(e.op("Sub", size, e.ints(1)), torch.int64, dtype)
    place = e.op("Mul", e.tensor(q, dtype), last)
    low = e.op("Floor", place)
    below, above = (
        e.op("Gather", ordered, e.cast(p, dtype, torch.int64), axis=axis)
        for p in (low, e.op("Ceil", place))
    )
    found = e.op("Add", below, e.op("Mul", e.op("Sub", above, below), e.op("Sub", place, low)))
    if dim is None:
        found = e.op("Reshape", found, e.ints(*[1] * rank if keepdim else []))
    elif not keepdim:
        found = e.op("Squeeze", found, e.ints(axis))
    return _or_nan(e, a, found, dim, keepdim)
