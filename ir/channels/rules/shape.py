"""Rules of operators that move, split, join or repeat positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from graphwright.ir.channels.reshape import reshape
from graphwright.ir.channels.values import Factor, Result, Value, factor
from graphwright.ir.channels.walk import Call, UnknownCallError, Walk, rule

END = 2**62


@rule("reshape", "view", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as")
def _reshape(walk: Walk, call: Call) -> Result:
    return reshape(walk, call.first, call.shape)


@rule("squeeze", "unsqueeze")
def _squeeze(walk: Walk, call: Call) -> Result:
    return reshape(walk, call.first, call.shape)


def _permuted(walk: Walk, x: Value, order: Sequence[int]) -> Value:
    """Dimension `order[i]` of `x` becomes dimension i."""
    place = {old: new for new, old in enumerate(order)}
    factors = [factor([place[d] for d in f.dims], f.ids, f.zero) for f in x.factors]
    return walk.value([x.shape[d] for d in order], factors)


@rule("permute")
def _permute(walk: Walk, call: Call) -> Result:
    return _permuted(walk, call.first, call.dims("dims"))


@rule("transpose", "swapaxes", "t", "mT", "numpy_T")
def _transpose(walk: Walk, call: Call) -> Result:
    x = call.first
    order = list(range(len(x.shape)))
    if "dim0" in call.raw or "axis0" in call.raw:
        names = ("dim0", "dim1") if "dim0" in call.raw else ("axis0", "axis1")
        a, b = (call.dims(n)[0] for n in names)
    elif len(order) < 2:
        return x
    elif call.name == "numpy_T":
        return _permuted(walk, x, order[::-1])
    else:
        a, b = len(order) - 2, len(order) - 1
    order[a], order[b] = order[b], order[a]
    return _permuted(walk, x, order)


@rule("movedim")
def _movedim(walk: Walk, call: Call) -> Result:
    x = call.first
    sources, targets = call.dims("source"), call.dims("destination")
    placed = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in range(len(x.shape)) if d not in sources)
    return _permuted(
        walk, x, [placed[i] if i in placed else next(rest) for i in range(len(x.shape))]
    )


@rule("expand", "broadcast_to", "expand_as")
def _expand(walk: Walk, call: Call) -> Result:
    x, lead = call.first, len(call.shape) - len(call.first.shape)
    factors = [Factor(tuple(d + lead for d in f.dims), f.ids, f.zero) for f in x.factors]
    grown = [d for d in range(len(call.shape)) if d < lead or x.shape[d - lead] != call.shape[d]]
    return walk.value(call.shape, [*factors, *_free(walk, call, grown)])


def _free(walk: Walk, call: Call, dims: Sequence[int]) -> list[Factor]:
    """New ids for dimensions a call makes itself; symbolic ones are no channels."""
    sizes = call.node.meta["val"].shape
    return [
        Factor((d,), walk.classes.fresh(call.shape[d]), False)
        for d in dims
        if isinstance(sizes[d], int)
    ]


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
      "zeros_like", "ones_like", "full_like", "empty_like")  # fmt: skip
def _create(walk: Walk, call: Call) -> Result:
    if call.name.endswith("_like"):
        return call.first.flags(call.name == "zeros_like")
    zero = call.name in ("zeros", "new_zeros")
    dims = range(len(call.shape))
    return walk.value(call.shape, [Factor(f.dims, f.ids, zero) for f in _free(walk, call, dims)])


@rule("arange", "linspace", "scalar_tensor", "eye", "rand", "randn")
def _constant(walk: Walk, call: Call) -> Result:
    return Value(call.shape)


@rule("repeat")
def _repeat(walk: Walk, call: Call) -> Result:
    x, lead = call.first, len(call.shape) - len(call.first.shape)
    if any(not isinstance(r, int) for r in call.raw["repeats"]):
        repeats = [o // i for o, i in zip(call.shape, (1,) * lead + x.shape, strict=True)]
    else:
        repeats = list(call.raw["repeats"])
    factors = []
    for f in x.factors:
        tiles = [repeats[d + lead] for d in f.dims]
        factors.append(Factor(tuple(d + lead for d in f.dims), np.tile(f.ids, tiles), f.zero))
    grown = [d for d in range(len(call.shape))
             if repeats[d] != 1 and (d < lead or x.shape[d - lead] == 1)]  # fmt: skip
    return walk.value(call.shape, [*factors, *_free(walk, call, grown)])


@rule("repeat_interleave")
def _repeat_interleave(walk: Walk, call: Call) -> Result:
    x, dim = call.first, call.raw.get("dim")
    if not isinstance(call.raw.get("repeats"), int) or dim is None:
        raise UnknownCallError
    dim = dim % len(x.shape)
    f = x.at(dim)
    if f is not None:
        ids = np.repeat(f.ids, call.raw["repeats"], axis=f.dims.index(dim))
        x = x.swap(f, Factor(f.dims, ids, f.zero))
    return walk.value(call.shape, x.factors)


@rule("cat", "concat", "concatenate")
def _cat(walk: Walk, call: Call) -> Result:
    parts = [v for v in call["tensors"] if isinstance(v, Value)]
    if len(parts) != len(call["tensors"]):
        raise UnknownCallError
    parts = [p for p in parts if len(p.shape) == len(call.shape)]  # torch skips empty 1-D pieces
    axis = int(call.raw["dim"]) % len(call.shape)
    joint = [p.at(axis) for p in parts]
    along: Factor | None = None
    if len({f.dims if f else () for f in joint}) == 1 and joint[0] and len(joint[0].dims) > 1:
        whole = [f for f in joint if f is not None]
        place = whole[0].dims.index(axis)
        ids = np.concatenate([f.ids for f in whole], axis=place)
        along = Factor(whole[0].dims, ids, all(f.zero for f in whole))
        parts = [p.swap(f) for p, f in zip(parts, whole, strict=True)]
        hidden = set(whole[0].dims)
    else:
        parts = [walk.alone(p, axis)[0] for p in parts]
        hidden = {axis}
    labels = [[("own", i, d) if d in hidden else d for d in range(len(p.shape))]
              for i, p in enumerate(parts)]  # fmt: skip
    linked = walk.link(parts, labels, text="joined by a concatenation")
    pieces = {link.labels[0][1]: link for link in linked if isinstance(link.labels[0], tuple)}
    if along is None and pieces:
        arrays = [pieces[i].ids if i in pieces else np.zeros(p.shape[axis], np.int64)
                  for i, p in enumerate(parts)]  # fmt: skip
        zero = all(all(link.zero.values()) for link in pieces.values())
        along = Factor((axis,), np.concatenate(arrays), zero)
    result = walk.gather(call.shape, range(len(call.shape)), [
        link for link in linked if not isinstance(link.labels[0], tuple)
    ], lambda link: len(link.zero) == len(parts) and all(link.zero.values()))  # fmt: skip
    return walk.value(call.shape, (*result.factors, *([along] if along else [])))


@rule("stack")
def _stack(walk: Walk, call: Call) -> Result:
    parts = call["tensors"]
    axis = int(call.raw["dim"]) % len(call.shape)
    labels = [[d + (d >= axis) for d in range(len(p.shape))] for p in parts]
    linked = walk.link(parts, labels, text="joined by a stack")
    return walk.gather(
        call.shape, range(len(call.shape)), linked,
        lambda link: len(link.zero) == len(parts) and all(link.zero.values()),
    )  # fmt: skip


def _cut(walk: Walk, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
    """Positions start:end of a dimension."""
    shape = list(x.shape)
    shape[dim] = len(range(*slice(start, end, step).indices(shape[dim])))
    if step != 1:
        x = walk.fix(x, dim, "a slice with a step")
    f = x.at(dim)
    if f is not None:
        index = [slice(None)] * len(f.dims)
        index[f.dims.index(dim)] = slice(start, end)
        x = x.swap(f, Factor(f.dims, f.ids[tuple(index)], f.zero))
    return walk.value(shape, x.factors)


@rule("slice")
def _slice(walk: Walk, call: Call) -> Result:
    x, dim = call.first, call.dims()[0]
    start, end, step = call.raw.get("start"), call.raw.get("end"), call.raw.get("step") or 1
    if isinstance(start, fx.Node) or isinstance(end, fx.Node) or x.at(dim) is None:
        return Value(call.shape, walk.fix(x, dim, "a slice at a symbolic place").factors)
    return _cut(walk, x, dim, start or 0, END if end is None else end, step)


@rule("narrow")
def _narrow(walk: Walk, call: Call) -> Result:
    x, dim = call.first, call.dims()[0]
    start, length = call.raw["start"], call.raw["length"]
    if not (isinstance(start, int) and isinstance(length, int)):
        return Value(call.shape, walk.fix(x, dim, "a slice at a symbolic place").factors)
    return _cut(walk, x, dim, start, start + length)


@rule("slice_scatter")
def _slice_scatter(walk: Walk, call: Call) -> Result:
    base, source, dim = call["self"], call["src"], call.dims()[0]
    base, source = (walk.fix(v, dim, "written into a slice") for v in (base, source))
    names = range(len(call.shape))
    linked = walk.link([base, source], [names, names])
    return walk.gather(call.shape, names, linked, lambda k: all(k.zero.values()))


@rule("select_scatter")
def _select_scatter(walk: Walk, call: Call) -> Result:
    base, source, dim = call["self"], call["src"], call.dims()[0]
    base = walk.fix(base, dim, "written at one position")
    names = range(len(call.shape))
    linked = walk.link([base, source], [names, [d for d in names if d != dim]])
    return walk.gather(call.shape, names, linked, lambda k: all(k.zero.values()))


@rule("copy")
def _copy(walk: Walk, call: Call) -> Result:
    source, rank = call["src"], len(call.shape)
    names = range(rank)
    linked = walk.link([call.first, source], [names, list(names)[rank - len(source.shape) :]])
    return walk.gather(call.shape, names, linked, lambda k: k.zero.get(1, False))


def lengths(walk: Walk, call: Call) -> list[int]:
    """Extents of the pieces of a split, from its results."""
    dim = call.dims()[0]
    found = [walk.shape(part) for part in call.node.meta["val"]]
    return [part[dim] for part in found if part is not None]


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def _split(walk: Walk, call: Call) -> Result:
    x, dim = call.first, call.dims()[0]
    sizes = call.node.meta["val"][0].shape
    if not isinstance(sizes[dim], int):
        x = walk.fix(x, dim, "split into symbolic pieces")
    pieces: list[Value | None] = []
    start = 0
    for length in lengths(walk, call):
        pieces.append(_cut(walk, x, dim, start, start + length))
        start += length
    return pieces


def _dropped(walk: Walk, x: Value, dim: int, text: str) -> Value:
    x = walk.fix(x, dim, text)
    factors = [Factor(tuple(d - (d > dim) for d in f.dims), f.ids, f.zero) for f in x.factors]
    return walk.value([s for d, s in enumerate(x.shape) if d != dim], factors)


@rule("select")
def _select(walk: Walk, call: Call) -> Result:
    return _dropped(walk, call.first, call.dims()[0], "one position is selected")


@rule("unbind")
def _unbind(walk: Walk, call: Call) -> Result:
    dim = call.dims()[0]
    value = _dropped(walk, call.first, dim, "taken apart position by position")
    return [value] * len(call.node.meta["val"])


@rule("getitem")
def _getitem(walk: Walk, call: Call) -> Result:
    source = call["0"]
    return source[call.raw["1"]] if isinstance(source, list) else None


@rule("roll", "flip", "tril", "triu")
def _reorder(walk: Walk, call: Call) -> Result:
    x = call.first
    if call.name in ("tril", "triu"):
        dims: Sequence[int] = (len(x.shape) - 2, len(x.shape) - 1)
    else:
        dims = call.dims("dims")
    return walk.fix_all(x, dims, f"reordered by {call.name}")


@rule("unfold")
def _unfold(walk: Walk, call: Call) -> Result:
    x, dim = call.first, call.dims("dimension")[0]
    x = walk.fix(x, dim, "unfolded into windows")
    return Value(call.shape, x.factors)


@rule("pixel_shuffle")
def _pixel_shuffle(walk: Walk, call: Call) -> Result:
    x, square = call.first, int(call.raw["upscale_factor"]) ** 2
    c = len(x.shape) - 3
    x = walk.fix_all(x, (c + 1, c + 2), "a spatial dimension")
    x, f = walk.alone(x, c)
    if f is None:
        return Value(call.shape, x.factors)
    ids = f.ids.reshape(-1, square)
    walk.equal(ids, ids[:, :1], "channels that pixel shuffle lays out as one")
    return walk.value(call.shape, x.swap(f, Factor((c,), ids[:, 0], f.zero)).factors)


@rule("pixel_unshuffle")
def _pixel_unshuffle(walk: Walk, call: Call) -> Result:
    x, square = call.first, int(call.raw["downscale_factor"]) ** 2
    c = len(x.shape) - 3
    x = walk.fix_all(x, (c + 1, c + 2), "a spatial dimension")
    x, f = walk.alone(x, c)
    if f is None:
        return Value(call.shape, x.factors)
    return walk.value(call.shape, x.swap(f, Factor((c,), np.repeat(f.ids, square), f.zero)).factors)


@rule("channel_shuffle")
def _channel_shuffle(walk: Walk, call: Call) -> Result:
    x, groups = call.first, int(call.raw["groups"])
    x, f = walk.alone(x, 1)
    if f is None:
        return x
    ids = f.ids.reshape(groups, -1)
    walk.equal(ids, ids[:1], "offsets that a channel shuffle ties")
    return x.swap(f, Factor((1,), ids.T.reshape(-1), f.zero))


@rule("pad", "constant_pad_nd")
def _pad(walk: Walk, call: Call) -> Result:
    x, amounts = call.first, list(call.raw["pad"])
    constant = call.raw.get("mode", "constant") == "constant"
    keeps_zero = not (constant and call.raw.get("value"))
    for k in range(len(amounts) // 2):
        dim = len(x.shape) - 1 - k
        left, right = amounts[2 * k : 2 * k + 2]
        if left == 0 and right == 0:
            continue
        f = x.at(dim)
        whole = isinstance(left, int) and isinstance(right, int) and min(left, right) >= 0
        if f is None or not (constant and whole and len(f.dims) == 1):
            x = walk.fix(x, dim, "padded")
            continue
        ids = np.concatenate([walk.classes.fresh(left), f.ids, walk.classes.fresh(right)])
        x = x.swap(f, Factor(f.dims, ids, f.zero))
    return walk.value(call.shape, x.flags(keeps_zero).factors)
