"""Pooling, over windows and to a given number of cells."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.convolutions import spread
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, expression, sizes_of

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


# ---- maxima with places


@translates(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool_with_indices(
    e: Emitter, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Any:  # fmt: skip
    rank = _rank(node)
    kernel = spread(kernel, rank)
    value, added = _batched(e, x, rank)
    pooled, places = e.multi(
        "MaxPool", 2, value, kernel_shape=kernel,
        strides=spread(stride, rank) if stride else kernel, pads=spread(padding, rank) * 2,
        dilations=spread(dilation, rank), ceil_mode=int(ceil_mode),
    )  # fmt: skip
    # ONNX counts places over the whole tensor, torch over one channel.
    places = e.op("Mod", places, _area(e, sizes_of(x)[-rank:]))
    return [e.op("Squeeze", v, e.ints(0)) if added else v for v in (pooled, places)]


def _area(e: Emitter, sizes: list[Any]) -> ir.Value:
    area = e.ints(1)
    for size in sizes:
        area = e.op("Mul", area, _value(e, size))
    return area


@translates(aten.max_unpool2d.default)
def max_unpool(e: Emitter, node: fx.Node, x: Any, indices: Any, output_size: Any) -> Any:
    want = sizes_of(node)
    lead = len(want) - 2
    flat = e.ints(*[0] * lead, -1)
    zero = e.constant(0, node.meta["val"].dtype)
    area = _area(e, want[-2:])
    empty = e.op("Expand", zero, e.op("Concat", e.shape(want[:-2]), area, axis=0))
    values, places = (e.op("Reshape", e.values[v], flat) for v in (x, indices))
    placed = e.op("ScatterElements", empty, places, values, axis=-1)
    return e.op("Reshape", placed, e.shape(want))


@translates(
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)
def adaptive_max_pool(e: Emitter, node: fx.Node, x: Any, output_size: Any) -> Any:
    rank = _rank(node)
    have = sizes_of(x)[-rank:]
    want = [expression(size) for size in node.meta["val"][0].shape[-rank:]]
    first = x.meta["val"].dim() - rank
    if _is_read(node, 1):
        return _largest_with_places(e, x, rank, want)
    value = e.values[x]
    lowest = e.constant(float("-inf"), node.meta["val"][0].dtype)
    for axis in range(rank):
        if have[axis] == want[axis]:
            continue
        place = first + axis
        members = cell_members(e, have[axis], want[axis])
        behind = first + rank - place - 1
        if behind:
            members = e.op("Unsqueeze", members, e.ints(*range(2, 2 + behind)))
        spread_out = e.op("Where", members, e.op("Unsqueeze", value, e.ints(place)), lowest)
        value = e.op("ReduceMax", spread_out, e.ints(place + 1), keepdims=0)
    return [value, None]


def _is_read(node: fx.Node, result: int) -> bool:
    return any(user.args[1] == result for user in node.users)


def _largest_with_places(e: Emitter, x: fx.Node, rank: int, cells: list[Any]) -> list[ir.Value]:
    """The largest value of every cell and its place in the channel, over all places at once."""
    have = sizes_of(x)[-rank:]
    lead = sizes_of(x)[:-rank]
    inside: Any = None
    for axis in range(rank):
        members = cell_members(e, have[axis], cells[axis])
        others = [i for i in range(2 * rank) if i not in (axis, rank + axis)]
        members = e.op("Unsqueeze", members, e.ints(*others))
        inside = members if inside is None else e.op("And", inside, members)
    value = e.op("Unsqueeze", e.values[x], e.ints(*range(len(lead), len(lead) + rank)))
    lowest = e.constant(float("-inf"), x.meta["val"].dtype)
    spread_out = e.op("Where", inside, value, lowest)
    shape = e.op("Concat", e.shape([*lead, *cells]), e.ints(-1), axis=0)
    flat = e.op("Reshape", spread_out, shape)
    largest = e.op("ReduceMax", flat, e.ints(-1), keepdims=0)
    return [largest, e.op("ArgMax", flat, axis=-1, keepdims=0)]
