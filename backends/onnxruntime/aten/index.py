"""Gather, scatter, index, embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten import translates
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


@translates(aten.index.Tensor)
def index_tensor(e: Emitter, node: fx.Node, a: Any, indices: list[Any]) -> Any:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(index.meta["val"].dtype == torch.bool for _, index in given):
        return _boolean(e, node, a, given)
    if len(given) == 1:
        axis, index = given[0]
        return e.op("Gather", e.values[a], e.tensor(index, torch.int64), axis=axis)
    axes = [axis for axis, _ in given]
    rank = a.meta["val"].dim()
    order = [*axes, *(i for i in range(rank) if i not in axes)]
    value = e.values[a]
    if order != list(range(rank)):
        value = e.op("Transpose", value, perm=order)
    picked = e.op("GatherND", value, _stacked(e, [index for _, index in given]))
    if axes[0] == 0 or axes != list(range(axes[0], axes[0] + len(axes))):
        return picked
    # Adjacent index axes stay where they were; GatherND has put them in front.
    width = max(index.meta["val"].dim() for _, index in given)
    lead = [width + i for i in range(axes[0])]
    rest = [width + i for i in range(axes[0], rank - len(axes))]
    return e.op("Transpose", picked, perm=[*lead, *range(width), *rest])


def _stacked(e: Emitter, indices: list[fx.Node]) -> Any:
    """Index tensors, broadcast against each other, stacked along a new last axis."""
    fakes = [index.meta["val"] for index in indices]
    shape = torch.broadcast_shapes(*(f.shape for f in fakes))
    parts = []
    for index, fake in zip(indices, fakes, strict=True):
        value = e.tensor(index, torch.int64)
        if fake.shape != shape:
            value = e.op("Expand", value, e.shape(list(shape)))
        parts.append(e.op("Unsqueeze", value, e.ints(-1)))
    return e.op("Concat", *parts, axis=-1)


def _boolean(e: Emitter, node: fx.Node, a: Any, given: list[tuple[int, Any]]) -> Any:
    axis, mask = given[0]
    if len(given) > 1 or axis != 0:
        raise Untranslatable(node, "several index tensors with a boolean one")
    where = e.op("Transpose", e.op("NonZero", e.values[mask]), perm=[1, 0])
    return e.op("GatherND", e.values[a], where)


@translates(aten.nonzero.default)
def nonzero(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Transpose", e.op("NonZero", e.values[a]), perm=[1, 0])


@translates(aten.scatter.src, aten.scatter.value)
def scatter(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any) -> Any:
    dtype = node.meta["val"].dtype
    if isinstance(source, fx.Node):
        if sizes_of(source) != sizes_of(index):
            raise Untranslatable(node, "source larger than index")
        updates = e.tensor(source, dtype)
    else:
        updates = e.op("Expand", e.constant(source, dtype), e.shape(sizes_of(index)))
    return e.op("ScatterElements", e.values[a], e.values[index], updates, axis=dim)


@translates(aten.scatter_add.default)
def scatter_add(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any, source: Any) -> Any:
    if sizes_of(source) != sizes_of(index):
        raise Untranslatable(node, "source larger than index")
    return e.op(
        "ScatterElements", e.values[a], e.values[index], e.values[source], axis=dim,
        reduction="add",
    )  # fmt: skip


@translates(aten.index_put.default)
def index_put(
    e: Emitter, node: fx.Node, a: Any, indices: list[Any], values: Any, accumulate: bool = False
) -> Any:
    if any(i is None or i.meta["val"].dtype == torch.bool for i in indices):
        raise Untranslatable(node, "boolean or partial index")
    where = _stacked(e, indices)
    shape = torch.broadcast_shapes(*(i.meta["val"].shape for i in indices))
    want = [*shape, *a.meta["val"].shape[len(indices) :]]
    updates = e.op("Expand", e.tensor(values, a.meta["val"].dtype), e.shape(want))
    reduction = "add" if accumulate else "none"
    return e.op("ScatterND", e.values[a], where, updates, reduction=reduction)


@translates(aten.one_hot.default)
def one_hot(e: Emitter, node: fx.Node, a: Any, num_classes: int = -1) -> Any:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise Untranslatable(node, "class count known only at run time")
    depth, pair = e.constant(num_classes, torch.int64), e.ints(0, 1)
    return e.op("OneHot", e.values[a], depth, pair, axis=-1)
