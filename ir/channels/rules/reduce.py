"""Rules of reductions, pools, and whatever works along a dimension."""

from __future__ import annotations

from typing import Any

from graphwright.ir.channels.rules.elementwise import joined
from graphwright.ir.channels.values import Factor, Result, Value
from graphwright.ir.channels.walk import Call, Walk, rule


def _reduced(walk: Walk, shape: tuple[int, ...], x: Value, dims: tuple[int, ...]) -> Value:
    """The value without the reduced dimensions, which carry no factor any more."""
    if len(shape) == len(x.shape):
        return walk.value(shape, x.factors)
    place = {d: n for n, d in enumerate(d for d in range(len(x.shape)) if d not in dims)}
    factors = [Factor(tuple(place[d] for d in f.dims), f.ids, f.zero) for f in x.factors]
    return walk.value(shape, factors)


@rule("mean", "sum", "linalg_vector_norm", "norm")
def _contract(walk: Walk, call: Call) -> Result:
    x, dims = call.first, call.dims()
    order = call.raw.get("ord", call.raw.get("p", 2))
    for dim in dims:
        x, f = walk.alone(x, dim)
        if f is None:
            continue
        if walk.norm == "pin":
            x = walk.fix(x, dim, f"{call.name} over it, fixed by norm: pin")
        elif not f.zero or not isinstance(order, int | float) or order <= 0:
            x = walk.fix(x, dim, f"{call.name} over it, and a removed slot is not zero")
        else:
            x = x.swap(f)
    return _reduced(walk, call.shape, x, dims)


@rule("amax", "amin", "var", "std", "logsumexp", "prod", "any", "all", "argmax", "argmin",
      "count_nonzero")  # fmt: skip
def _reduce(walk: Walk, call: Call) -> Result:
    dims = call.dims()
    x = walk.fix_all(call.first, dims, f"{call.name} over it")
    keeps = call.name in ("amax", "amin", "any", "var", "std", "prod")
    return _reduced(walk, call.shape, x, dims).flags(keeps)


@rule("max", "min", "median", "mode", "kthvalue", "var_mean")
def _pairs(walk: Walk, call: Call) -> Result:
    if isinstance(call.get("other"), Value):
        return joined(walk, call, [call.first, call["other"]], "all")
    parts = call.node.meta["val"]
    many = isinstance(parts, list | tuple)
    shape = (walk.shape(parts[0]) or ()) if many else call.shape
    dims = call.dims()
    x = walk.fix_all(call.first, dims, f"{call.name} over it")
    value = _reduced(walk, shape, x, dims)
    if many:
        return [value.flags(call.name in ("max", "min")), value.flags(False)]
    return value


@rule("softmax", "log_softmax", "_softmax", "cumsum", "cumprod", "diff", "logcumsumexp",
      "argsort", "softmin")  # fmt: skip
def _along(walk: Walk, call: Call) -> Result:
    x = walk.fix_all(call.first, call.dims(), f"{call.name} along it")
    return Value(call.shape, x.flags(call.name in ("cumsum", "diff")).factors)


@rule("sort", "topk")
def _ranked(walk: Walk, call: Call) -> Result:
    x = walk.fix_all(call.first, call.dims(), f"{call.name} along it")
    parts: Any = call.node.meta["val"]
    return [Value(walk.shape(part) or (), x.flags(False).factors) for part in parts]


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d",
      "adaptive_max_pool1d", "max_pool2d_with_indices", "upsample_nearest1d",
      "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
      "upsample_linear1d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d",
      "replication_pad1d", "replication_pad2d", "_upsample_bicubic2d_aa",
      "_upsample_bilinear2d_aa", "lp_pool2d")  # fmt: skip
def _pool(walk: Walk, call: Call) -> Result:
    x = call.first
    spatial = next(int(c) for c in call.name if c.isdigit())
    rank = len(x.shape)
    x = walk.fix_all(x, range(rank - spatial, rank), "a spatial dimension")
    parts = call.node.meta["val"]
    if isinstance(parts, list | tuple):  # the second are places of the largest
        shapes = [walk.shape(part) or () for part in parts]
        return [
            Value(shapes[0], x.factors),
            *(Value(s, x.flags(False).factors) for s in shapes[1:]),
        ]
    return Value(call.shape, x.factors)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
      "rnn_relu_cell")  # fmt: skip
def _recurrent(walk: Walk, call: Call) -> Result:
    for value in call.tensors():
        walk.freeze(value, f"a recurrent cell ({call.name})")
    parts = call.node.meta["val"]
    if isinstance(parts, list | tuple):
        return [Value(walk.shape(part) or ()) for part in parts]
    return Value(call.shape)
