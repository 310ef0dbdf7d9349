"""Ops that move or repeat elements: reshape, permute, slice, concat, pad."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import (
    Emitter,
    Untranslatable,
    expression,
    sizes_of,
)

aten = torch.ops.aten
END = 2**63 - 1
"""Torch's number for an open slice end."""


@translates(
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
)
def reshape(e: Emitter, node: fx.Node, a: Any, *_: Any, **__: Any) -> Any:
    have, want = sizes_of(a), sizes_of(node)
    if node.target is aten.unsqueeze.default:
        axis = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
        if sum(not isinstance(s, int) for s in have) > 1:
            return e.op("Unsqueeze", e.values[a], e.ints(int(axis) % len(want)))  # type: ignore[arg-type]
    return e.reshape(e.values[a], have, want)


@translates(aten.view.dtype)
def view_dtype(e: Emitter, node: fx.Node, a: Any, dtype: Any) -> Any:
    raise Untranslatable(node, "reinterprets bits")


@translates(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(e: Emitter, node: fx.Node, a: Any, *_: Any, **__: Any) -> Any:
    have, want = sizes_of(a), sizes_of(node)
    if have == want:
        return e.values[a]
    lead = len(want) - len(have)
    # A 1 keeps the input's size, so only the axes that grow have to be computed.
    sizes = [w if i < lead or have[i - lead] != w else 1 for i, w in enumerate(want)]
    return e.op("Expand", e.values[a], e.shape(sizes))


def permuted(e: Emitter, node: fx.Node, a: Any, order: list[int]) -> Any:
    if order == list(range(len(order))):
        return e.values[a]
    return e.op("Transpose", e.values[a], perm=order)


@translates(aten.transpose.int, aten.swapaxes.default)
def transpose(e: Emitter, node: fx.Node, a: Any, dim0: int, dim1: int) -> Any:
    order = list(range(a.meta["val"].dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permuted(e, node, a, order)


@translates(aten.permute.default)
def permute(e: Emitter, node: fx.Node, a: Any, dims: list[int]) -> Any:
    rank = a.meta["val"].dim()
    return permuted(e, node, a, [d % rank for d in dims])


@translates(aten.t.default, aten.mT.default, aten.numpy_T.default)
def t(e: Emitter, node: fx.Node, a: Any) -> Any:
    rank = a.meta["val"].dim()
    if rank < 2:
        return e.values[a]
    order = list(range(rank))
    if node.target is aten.numpy_T.default:
        return permuted(e, node, a, order[::-1])
    return permuted(e, node, a, [*order[:-2], rank - 1, rank - 2])


@translates(aten.movedim.int, aten.movedim.intlist)
def movedim(e: Emitter, node: fx.Node, a: Any, source: Any, destination: Any) -> Any:
    rank = a.meta["val"].dim()
    sources = [s % rank for s in ([source] if isinstance(source, int) else source)]
    places = [d % rank for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(i for i in range(rank) if i not in sources)
    order = [sources[places.index(i)] if i in places else next(rest) for i in range(rank)]
    return permuted(e, node, a, order)


@translates(aten.slice.Tensor)
def slice_(
    e: Emitter, node: fx.Node, a: Any, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Any:  # fmt: skip
    have, want = sizes_of(a), sizes_of(node)
    if have == want and step == 1:
        return e.values[a]
    begin = e.ints(0) if start is None else e.index(start)
    stop = e.ints(END) if end is None else e.index(end)
    axis = e.ints(dim % len(have))
    return e.op("Slice", e.values[a], begin, stop, axis, e.ints(step))


@translates(aten.narrow.default)
def narrow(e: Emitter, node: fx.Node, a: Any, dim: int, start: Any, length: Any) -> Any:
    begin = e.index(start)
    stop = e.op("Add", begin, e.index(length))
    return e.op("Slice", e.values[a], begin, stop, e.ints(dim % a.meta["val"].dim()))


@translates(aten.select.int)
def select(e: Emitter, node: fx.Node, a: Any, dim: int, index: Any) -> Any:
    if isinstance(index, int):
        return e.op("Gather", e.values[a], e.constant(index, torch.int64), axis=dim)
    return e.op("Gather", e.values[a], e.op("Squeeze", e.index(index)), axis=dim)


def split_into(e: Emitter, node: fx.Node, a: Any, dim: int) -> Any:
    """Split by the sizes that the results are known to have."""
    parts = node.meta["val"]
    sizes = [expression(part.shape[dim]) for part in parts]
    if len(parts) == 1:
        return [e.values[a]]
    rank = parts[0].dim()
    return e.multi("Split", len(parts), e.values[a], e.shape(sizes), axis=dim % rank)


@translates(aten.split.Tensor, aten.chunk.default, aten.tensor_split.sections)
def split(e: Emitter, node: fx.Node, a: Any, _: Any, dim: int = 0) -> Any:
    return split_into(e, node, a, dim)


@translates(aten.split_with_sizes.default, aten.split.sizes)
def split_with_sizes(e: Emitter, node: fx.Node, a: Any, _: Any, dim: int = 0) -> Any:
    return split_into(e, node, a, dim)


@translates(aten.unbind.int)
def unbind(e: Emitter, node: fx.Node, a: Any, dim: int = 0) -> Any:
    count = len(node.meta["val"])
    return [e.op("Gather", e.values[a], e.constant(i, torch.int64), axis=dim) for i in range(count)]


@translates(operator.getitem)
def getitem(e: Emitter, node: fx.Node, a: Any, index: int) -> Any:
    return e.values[a][index]


@translates(aten.cat.default, aten.concat.default)
def cat(e: Emitter, node: fx.Node, tensors: list[Any], dim: int = 0) -> Any:
    dtype = node.meta["val"].dtype
    # torch skips a 1-D empty tensor whatever the other ranks are.
    kept = [t for t in tensors if sizes_of(t) != [0] or node.meta["val"].dim() == 1]
    parts = [e.tensor(t, dtype) for t in kept]
    if len(parts) == 1:
        return parts[0]
    return e.op("Concat", *parts, axis=dim % node.meta["val"].dim())


@translates(aten.stack.default)
def stack(e: Emitter, node: fx.Node, tensors: list[Any], dim: int = 0) -> Any:
    axis = dim % node.meta["val"].dim()
    dtype = node.meta["val"].dtype
    parts = [e.op("Unsqueeze", e.tensor(t, dtype), e.ints(axis)) for t in tensors]
    return e.op("Concat", *parts, axis=axis)


@translates(aten.repeat.default, aten.tile.default)
def repeat(e: Emitter, node: fx.Node, a: Any, repeats: list[Any]) -> Any:
    lead = len(repeats) - a.meta["val"].dim()
    if lead < 0:
        raise Untranslatable(node, "fewer repeats than axes")
    value = e.values[a]
    if lead:
        value = e.op("Unsqueeze", value, e.ints(*range(lead)))
    return e.op("Tile", value, e.shape([_number(r) for r in repeats]))


def _number(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg


@translates(aten.repeat_interleave.self_int)
def repeat_interleave(
    e: Emitter, node: fx.Node, a: Any, repeats: Any, dim: int | None = None, **_: Any
) -> Any:
    if dim is None or isinstance(repeats, fx.Node):
        raise Untranslatable(node, "without an axis, or by a dynamic count")
    have = sizes_of(a)
    axis = dim % len(have)
    wide = e.op("Unsqueeze", e.values[a], e.ints(axis + 1))
    counts = [1] * (len(have) + 1)
    counts[axis + 1] = repeats
    tiled = e.op("Tile", wide, e.ints(*counts))
    middle = [*have[: axis + 1], repeats, *have[axis + 1 :]]
    return e.reshape(tiled, middle, sizes_of(node))


@translates(aten.flip.default)
def flip(e: Emitter, node: fx.Node, a: Any, dims: list[int]) -> Any:
    rank, count = a.meta["val"].dim(), len(dims)
    axes = e.ints(*[d % rank for d in dims])
    starts, ends = e.ints(*[-1] * count), e.ints(*[-END] * count)
    return e.op("Slice", e.values[a], starts, ends, axes, e.ints(*[-1] * count))


@translates(aten.roll.default)
def roll(e: Emitter, node: fx.Node, a: Any, shifts: list[Any], dims: list[int] = ()) -> Any:  # type: ignore[assignment]
    if not dims:
        raise Untranslatable(node, "roll over the flattened tensor")
    value, have = e.values[a], sizes_of(a)
    for shift, dim in zip(shifts, dims, strict=True):
        if not isinstance(shift, int):
            raise Untranslatable(node, "dynamic shift")
        size = have[dim]
        cut = -shift % size if isinstance(size, int) else -shift
        if cut == 0:
            continue
        axis, point = e.ints(dim % len(have)), e.ints(cut)
        tail = e.op("Slice", value, point, e.ints(END), axis)
        head = e.op("Slice", value, e.ints(0), point, axis)
        value = e.op("Concat", tail, head, axis=dim)
    return value


@translates(aten.tril.default, aten.triu.default)
def triangle(e: Emitter, node: fx.Node, a: Any, diagonal: int = 0) -> Any:
    upper = int(node.target is aten.triu.default)
    dtype = a.meta["val"].dtype
    work = torch.int64 if dtype == torch.bool else dtype
    value = e.op("Trilu", e.tensor(a, work), e.constant(diagonal, torch.int64), upper=upper)
    return e.cast(value, work, dtype)


@translates(aten.pad.default, aten.constant_pad_nd.default)
def pad(
    e: Emitter, node: fx.Node, a: Any, widths: list[Any], mode: Any = "constant",
    value: Any = None,
) -> Any:  # fmt: skip
    if node.target is aten.constant_pad_nd.default:
        mode, value = "constant", 0 if mode == "constant" else mode
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    # For every axis, the first ones too: see pads.py. Torch counts from the last axis.
    rest = [0] * (a.meta["val"].dim() - len(widths) // 2)
    begins = [*rest, *(_number(w) for w in reversed(widths[0::2]))]
    ends = [*rest, *(_number(w) for w in reversed(widths[1::2]))]
    dtype = node.meta["val"].dtype
    fill = e.tensor(value or 0, dtype) if mode == "constant" else None
    work = e.values[a]
    if dtype == torch.bool:
        work, fill = e.cast(work, dtype, torch.int32), e.constant(int(value or 0), torch.int32)
    out = e.op("Pad", work, e.shape([*begins, *ends]), fill, mode=modes[mode])
    return e.cast(out, torch.int32, dtype) if dtype == torch.bool else out


@translates(
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default
)
def reflection_pad(e: Emitter, node: fx.Node, a: Any, widths: list[Any]) -> Any:
    return pad(e, node, a, widths, "reflect")


@translates(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)
def replication_pad(e: Emitter, node: fx.Node, a: Any, widths: list[Any]) -> Any:
    return pad(e, node, a, widths, "replicate")
