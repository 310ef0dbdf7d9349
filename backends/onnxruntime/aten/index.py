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
