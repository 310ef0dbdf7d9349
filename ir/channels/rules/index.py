"""Rules of operators that read or write positions given by an index tensor."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.ir.channels.values import Factor, Result, Value
from graphwright.ir.channels.walk import Call, UnknownCallError, Walk, rule


@rule("index", "_unsafe_index")
def _index(walk: Walk, call: Call) -> Result:
    x, indices = call.first, list(call["indices"])
    indices += [None] * (len(x.shape) - len(indices))
    given = [d for d, i in enumerate(indices) if isinstance(i, Value)]
    if any(_is_mask(call, d) for d in given):
        raise UnknownCallError
    for d in given:
        x = walk.fix(x, d, "indexed")
        walk.freeze(indices[d], "an index")
    depth = len(call.shape) - (len(x.shape) - len(given))
    together = given == list(range(given[0], given[-1] + 1)) if given else True
    at = given[0] if together and given else 0
    rest = [d for d in range(len(x.shape)) if d not in given]
    place = {d: n if n < at else n + depth for n, d in enumerate(rest)}
    factors = [Factor(tuple(place[d] for d in f.dims), f.ids, f.zero) for f in x.factors]
    return walk.value(call.shape, factors)


def _is_mask(call: Call, position: int) -> bool:
    node: Any = call.raw["indices"][position]
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index_select")
def _index_select(walk: Walk, call: Call) -> Result:
    walk.freeze(call["index"], "an index")
    x = walk.fix(call.first, call.dims()[0], "indexed")
    return Value(call.shape, x.factors)


@rule("gather")
def _gather(walk: Walk, call: Call) -> Result:
    return _indexed(walk, call, [call.first, call["index"]], {0})


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(walk: Walk, call: Call) -> Result:
    if isinstance(call.get("src"), Value):
        return _indexed(walk, call, [call.first, call["index"], call["src"]], {0, 2})
    written = _indexed(walk, call, [call.first, call["index"]], {0})
    return written.flags(call.raw.get("value") == 0)


@rule("index_add", "index_copy")
def _index_add(walk: Walk, call: Call) -> Result:
    walk.freeze(call["index"], "an index")
    dim, names = call.dims()[0], range(len(call.shape))
    values = [walk.fix(v, dim, f"indexed by {call.name}") for v in (call.first, call["source"])]
    linked = walk.link(values, [names, names])
    return walk.gather(
        call.shape, names, linked, lambda k: len(k.zero) == 2 and all(k.zero.values())
    )


def _indexed(walk: Walk, call: Call, values: list[Value], holders: set[int]) -> Value:
    """Operands that agree in all dimensions but `dim`, which is fixed.

    Args:
        walk, call: as for a rule.
        values: operands.
        holders: which of them hold what the result is made of.
    """
    dim, names = call.dims()[0], list(range(len(call.shape)))
    for d in names:
        if d == dim or len({v.shape[d] for v in values}) > 1:
            values = [walk.fix(v, d, f"indexed by {call.name}") for v in values]
    linked = walk.link(values, [names] * len(values))
    return walk.gather(call.shape, names, linked,
                       lambda k: all(k.zero.get(i, False) for i in holders))  # fmt: skip


@rule("index_put")
def _index_put(walk: Walk, call: Call) -> Result:
    x, values, indices = call.first, call["values"], list(call["indices"])
    given = [d for d, i in enumerate(indices) if isinstance(i, Value)]
    if any(_is_mask(call, d) for d in given) or given != list(range(len(given))):
        raise UnknownCallError
    for d in given:
        x = walk.fix(x, d, "indexed")
        walk.freeze(indices[d], "an index")
    names = list(range(len(x.shape)))
    tail = names[len(given) :]
    shape = values.shape
    labels: list[Any] = [None] * max(0, len(shape) - len(tail)) + tail[
        max(0, len(tail) - len(shape)) :
    ]
    linked = walk.link([x, values], [names, labels])
    return walk.gather(call.shape, names, linked, lambda k: all(k.zero.get(i) for i in (0, 1)))
