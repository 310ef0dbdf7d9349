"""Reading and writing at index tensors and masks, gathering, embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


@translates(aten.embedding.default)
def embedding(e: Emitter, node: fx.Node, weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    return e.op("Gather", e.values[weight], e.values[indices], axis=0)


@translates(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(
    e: Emitter, node: fx.Node, weight: Any, indices: Any, offsets: Any, by_frequency: bool = False,
    mode: int = 0, sparse: bool = False, factors: Any = None, ends_too: bool = False,
    padding: Any = None,
) -> Any:  # fmt: skip
    """Rows added up, averaged or at their largest (`mode`), from each offset to the next."""
    if any(user.args[1] != 0 for user in node.users):
        raise Untranslatable(node, "the places and sizes of its bags are read")
    dtype, count = weight.meta["val"].dtype, offsets.meta["val"].shape[0]
    flat, lead = e.tensor(indices, torch.int64), e.ints(0)
    rows = e.op("Gather", e.values[weight], flat, axis=0)
    if factors is not None:
        rows = e.op("Mul", rows, e.op("Unsqueeze", e.values[factors], e.ints(1)))
    # A one where each bag starts; how many of them came up to a row tells its bag.
    starts = e.tensor(offsets, torch.int64)
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    marks = e.op("Expand", zero, e.shape([indices.meta["val"].shape[0] + 1]))
    ones = e.op("Expand", one, e.op("Shape", starts))
    marks = e.op("ScatterElements", marks, starts, ones, axis=0, reduction="add")
    bags = e.op("Sub", e.op("CumSum", marks, zero), one)
    bags = e.op("Slice", bags, lead, e.ints(-1), lead)
    none = e.constant(float("-inf") if mode == 2 else 0.0, dtype)
    counted = e.op("Expand", e.constant(1.0, dtype), e.op("Shape", flat))
    if padding is not None:
        pad = e.constant(padding % weight.meta["val"].shape[0], torch.int64)
        is_pad = e.op("Equal", flat, pad)
        rows = e.op("Where", e.op("Unsqueeze", is_pad, e.ints(1)), none, rows)
        counted = e.op("Where", is_pad, e.constant(0.0, dtype), counted)
    sizes = e.op("Expand", e.constant(0.0, dtype), e.op("Shape", starts))
    sizes = e.op("ScatterElements", sizes, bags, counted, axis=0, reduction="add")
    sizes = e.op("Unsqueeze", sizes, e.ints(1))
    base = e.op("Expand", none, e.shape([count, weight.meta["val"].shape[1]]))
    where = e.op("Expand", e.op("Unsqueeze", bags, e.ints(1)), e.op("Shape", rows))
    kind = "max" if mode == 2 else "add"
    found = e.op("ScatterElements", base, where, rows, axis=0, reduction=kind)
    if mode == 1:
        found = e.op("Div", found, e.op("Max", sizes, e.constant(1.0, dtype)))
    if mode == 2:
        is_empty = e.op("Equal", sizes, e.constant(0.0, dtype))
        found = e.op("Where", is_empty, e.constant(0.0, dtype), found)
    if ends_too:  # the last offset only ends the last bag
        found = e.op("Slice", found, lead, e.ints(-1), lead)
    return [found, None, None, None]


@translates(aten.gather.default)
def gather(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, **_: Any) -> Any:
    return e.op("GatherElements", e.values[a], e.tensor(index, torch.int64), axis=dim)


@translates(aten.index_select.default)
def index_select(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any) -> Any:
    return e.op("Gather", e.values[a], e.tensor(index, torch.int64), axis=dim)


@dataclass
class Picked:
    """An index tensor on one axis: integers, or one axis of a boolean mask's true places.

    Attributes:
        axis: of the tensor that is indexed.
        value: int64 indices.
        shape: their sizes; None where only a run tells how many there are.
    """

    axis: int
    value: ir.Value
    shape: list[Any] | None

    @property
    def rank(self) -> int:
        return 1 if self.shape is None else len(self.shape)


def picked_axes(e: Emitter, indices: Sequence[Any]) -> list[Picked]:
    """The axes that a list of index tensors picks from; a mask gives one for each of its axes."""
    found: list[Picked] = []
    axis = 0
    for index in indices:
        fake = None if index is None else index.meta["val"]
        if fake is None or fake.dtype not in (torch.bool, torch.uint8):
            if fake is not None:
                found.append(Picked(axis, e.tensor(index, torch.int64), sizes_of(index)))
            axis += 1
            continue
        places = e.op("NonZero", e.tensor(index, torch.bool))
        for row in range(fake.dim()):
            found.append(Picked(axis, e.op("Gather", places, e.constant(row, torch.int64)), None))
            axis += 1
    return found


def stacked(e: Emitter, picked: Sequence[Picked]) -> ir.Value:
    """Index tensors, broadcast against each other, stacked along a new last axis."""
    values = [p.value for p in picked]
    shapes = [p.shape for p in picked]
    if any(shape != shapes[0] for shape in shapes):
        nothing = e.op("Mul", values[0], e.constant(0, torch.int64))
        for value in values[1:]:
            nothing = e.op("Add", nothing, e.op("Mul", value, e.constant(0, torch.int64)))
        values = [e.op("Add", value, nothing) for value in values]
    return e.op("Concat", *[e.op("Unsqueeze", v, e.ints(-1)) for v in values], axis=-1)  # type: ignore[no-any-return]


def index_order(picked: Sequence[Picked], rank: int) -> list[int]:
    """All axes, the picked ones in front."""
    axes = [p.axis for p in picked]
    return [*axes, *(i for i in range(rank) if i not in axes)]


def result_order(picked: Sequence[Picked], rank: int) -> list[int]:
    """The places in torch's result of the axes of a gathered tensor (index axes in front).

    Adjacent index axes stay where they were; others come to the front.
    """
    axes = [p.axis for p in picked]
    width = max(p.rank for p in picked)
    total = width + rank - len(axes)
    if axes != list(range(axes[0], axes[0] + len(axes))):
        return list(range(total))
    lead = [width + i for i in range(axes[0])]
    return [*lead, *range(width), *range(width + axes[0], total)]


@translates(aten.index.Tensor)
def index_tensor(e: Emitter, node: fx.Node, a: Any, indices: list[Any]) -> Any:
    picked = picked_axes(e, indices)
    if len(picked) == 1:
        return e.op("Gather", e.values[a], picked[0].value, axis=picked[0].axis)
    rank = a.meta["val"].dim()
    value = _transposed(e, e.values[a], index_order(picked, rank))
    gathered = e.op("GatherND", value, stacked(e, picked))
    return _transposed(e, gathered, result_order(picked, rank))


def _transposed(e: Emitter, value: ir.Value, order: list[int]) -> ir.Value:
    if order == list(range(len(order))):
        return value
    return e.op("Transpose", value, perm=order)  # type: ignore[no-any-return]


@translates(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(
    e: Emitter, node: fx.Node, a: Any, indices: list[Any], values: Any, accumulate: bool = False
) -> Any:
    dtype, rank = a.meta["val"].dtype, a.meta["val"].dim()
    value = e.tensor(values, dtype)
    if _is_one_mask(indices, values) and not accumulate:
        mask = e.tensor(indices[0], torch.bool)
        missing = rank - indices[0].meta["val"].dim()
        if missing:
            mask = e.op("Unsqueeze", mask, e.ints(*range(rank - missing, rank)))
        return e.op("Where", mask, value, e.values[a])
    picked = picked_axes(e, indices)
    order = index_order(picked, rank)
    where = stacked(e, picked)
    # The written values are broadcast to what reading the same places gives.
    placed = result_order(picked, rank)
    rest = [sizes_of(a)[i] for i in order[len(picked) :]]
    front = e.op("Slice", e.op("Shape", where), e.ints(0), e.ints(-1), e.ints(0))
    read = e.op("Concat", front, e.shape(rest), axis=0) if rest else front
    if placed != list(range(len(placed))):
        value = e.op("Expand", value, e.op("Gather", read, e.ints(*placed), axis=0))
        value = e.op("Transpose", value, perm=[placed.index(i) for i in range(len(placed))])
    else:
        value = e.op("Expand", value, read)
    base = _transposed(e, e.values[a], order)
    reduction = "add" if accumulate else "none"
    written = e.op("ScatterND", base, where, value, reduction=reduction)
    return _transposed(e, written, [order.index(i) for i in range(rank)])


def _is_one_mask(indices: list[Any], values: Any) -> bool:
    """One mask in front, and one value for all its places."""
    return (
        len(indices) == 1
        and indices[0] is not None
        and indices[0].meta["val"].dtype == torch.bool
        and values.meta["val"].dim() == 0
    )


@translates(aten.masked_select.default)
def masked_select(e: Emitter, node: fx.Node, a: Any, mask: Any) -> Any:
    shape = e.shape(list(torch.broadcast_shapes(a.meta["val"].shape, mask.meta["val"].shape)))
    value = e.op("Expand", e.values[a], shape)
    chosen = e.op("Expand", e.tensor(mask, torch.bool), shape)
    flat = e.ints(-1)
    return e.op("Compress", e.op("Reshape", value, flat), e.op("Reshape", chosen, flat), axis=0)


@translates(aten.nonzero.default)
def nonzero(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Transpose", e.op("NonZero", e.tensor(a, torch.bool)), perm=[1, 0])


@translates(aten.nonzero_numpy.default)
def nonzero_numpy(e: Emitter, node: fx.Node, a: Any) -> Any:
    places = e.op("NonZero", e.tensor(a, torch.bool))
    rank = a.meta["val"].dim()
    return [e.op("Gather", places, e.constant(i, torch.int64), axis=0) for i in range(rank)]


@translates(aten.one_hot.default)
def one_hot(e: Emitter, node: fx.Node, a: Any, num_classes: int = -1) -> Any:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise Untranslatable(node, "class count known only at run time")
    depth, pair = e.constant(num_classes, torch.int64), e.ints(0, 1)
    return e.op("OneHot", e.values[a], depth, pair, axis=-1)
