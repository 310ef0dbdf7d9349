"""Rules of operators with weights: products, convolutions, embeddings, norms, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphwright.ir.channels.classes import Ids
from graphwright.ir.channels.values import Factor, Result, Value
from graphwright.ir.channels.walk import Call, Linked, UnknownCallError, Walk, rule

TIED = "offsets that groups of a layer share"


def contract(walk: Walk, linked: list[Linked], label: Any, text: str) -> None:
    """Pins a dimension that is summed over while no operand's removed slots are zero."""
    for link in linked:
        if label in link.labels and not any(link.zero.values()):
            walk.classes.pin(link.ids, walk.node, text)


@rule("linear")
def _linear(walk: Walk, call: Call) -> Result:
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    if not isinstance(weight, Value) or len(weight.shape) != 2:
        raise UnknownCallError
    labels: list[list[Any]] = [[*range(len(x.shape) - 1), "in"], ["out", "in"]]
    values = [x, weight]
    if bias is not None:
        values.append(bias)
        labels.append(["out"])
    linked = walk.link(values, labels, {"in", "out"}, "a fixed input of a linear layer")
    contract(walk, linked, "in", "summed over by a linear layer")
    out = [*range(len(x.shape) - 1), "out"]
    return walk.gather(call.shape, out, linked, _biased(bias))


@rule("expert_linear")
def _expert_linear(walk: Walk, call: Call) -> Result:
    return _routed(walk, call, ["expert", "out", "in"])


@rule("expert_matmul")
def _expert_matmul(walk: Walk, call: Call) -> Result:
    return _routed(walk, call, ["expert", "in", "out"])


def _routed(walk: Walk, call: Call, axes: list[Any]) -> Result:
    """A stack of experts: an offset is one unit in all of them."""
    walk.freeze(call["experts"], "the choice of an expert")
    values = [call["x"], walk.fix(call["weight"], 0, "an expert")]
    labels: list[list[Any]] = [["row", "in"], axes]
    bias = call.get("bias")
    if bias is not None:
        values.append(walk.fix(bias, 0, "an expert"))
        labels.append(["expert", "out"])
    linked = walk.link(values, labels, {"in", "out"}, "a fixed input of a stack of experts")
    contract(walk, linked, "in", "summed over by experts")
    return walk.gather(call.shape, ["row", "out"], linked, _biased(bias))


def _biased(bias: Value | None) -> Callable[[Linked], bool]:
    """A bias adds to every position of the other dimensions: they are zero only without one."""

    def zero(link: Linked) -> bool:
        if "out" in link.labels:
            return bool(link.zero.get(1)) and (bias is None or bool(link.zero.get(2)))
        return bias is None and bool(link.zero.get(0))

    return zero


def _convolution_input(walk: Walk, call: Call, x: Value, weight: Value) -> tuple[Value, int]:
    """The input with its channels alone and its spatial dimensions fixed; the channel dim."""
    spatial = len(weight.shape) - 2
    channel = len(x.shape) - spatial - 1
    x = walk.fix_all(x, range(channel + 1, len(x.shape)), "a spatial dimension")
    return walk.alone(x, channel)[0], channel


def _ids(value: Value, dim: int) -> Ids:
    f = value.at(dim)
    return np.zeros(value.shape[dim], np.int64) if f is None else f.ids


def _is_zero(value: Value | None, dim: int) -> bool:
    f = None if value is None else value.at(dim)
    return f is not None and f.zero


@rule("conv1d", "conv2d", "conv3d")
def _convolution(walk: Walk, call: Call) -> Result:
    x, weight, bias, groups = call["input"], call["weight"], call.get("bias"), call.raw["groups"]
    weight = walk.fix_all(weight, range(2, len(weight.shape)), "a kernel dimension")
    weight = walk.alone(walk.alone(weight, 0)[0], 1)[0]
    x, channel = _convolution_input(walk, call, x, weight)
    text = "a fixed channel of a convolution"
    source, out, inner = _ids(x, channel), _ids(weight, 0), _ids(weight, 1)
    if groups == 1:
        walk.equal(source, inner, text)
    elif groups == len(source):
        walk.equal(out.reshape(groups, -1), source[:, None], text)
        walk.classes.pin(inner, walk.node, "inside one group of a convolution")
    else:
        parts = source.reshape(groups, -1)
        walk.equal(parts, parts[:1], TIED)
        walk.equal(parts[0], inner, text)
        rows = out.reshape(groups, -1)
        walk.equal(rows, rows[:1], TIED)
    if groups != len(source) and not (_is_zero(weight, 1) or _is_zero(x, channel)):
        walk.classes.pin(inner, walk.node, "summed over by a convolution")
    return _convolved(walk, call, x, channel, bias, out, _is_zero(weight, 0))


def _convolved(
    walk: Walk, call: Call, x: Value, channel: int, bias: Value | None, out: Ids, zero: bool
) -> Value:
    """The result: output channels, and whatever the other dimensions of the input carry."""
    if bias is not None:
        walk.equal(out, _ids(bias, 0), "a bias that is fixed")
    own = Factor((channel,), out, zero and (bias is None or _is_zero(bias, 0)))
    others = [f for f in x.factors if channel not in f.dims]
    passed = Value(x.shape, tuple(others)).flags(bias is None)
    return walk.value(call.shape, (*passed.factors, own))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(walk: Walk, call: Call) -> Result:
    x, weight, bias, groups = call["input"], call["weight"], call.get("bias"), call.raw["groups"]
    weight = walk.fix_all(weight, range(2, len(weight.shape)), "a kernel dimension")
    x, channel = _convolution_input(walk, call, x, weight)
    source, rows, inner = _ids(x, channel), _ids(weight, 0), _ids(weight, 1)
    walk.equal(source, rows, "a fixed channel of a transposed convolution")
    zero = _is_zero(weight, 1)
    if groups == 1:
        out = inner
    elif groups == len(source):
        walk.classes.pin(inner, walk.node, "inside one group of a transposed convolution")
        out, zero = np.repeat(rows, weight.shape[1]), _is_zero(weight, 0)
    else:
        parts = source.reshape(groups, -1)
        walk.equal(parts, parts[:1], TIED)
        out = np.tile(inner, groups)
    if groups != len(source) and not (_is_zero(weight, 0) or _is_zero(x, channel)):
        walk.classes.pin(rows, walk.node, "summed over by a transposed convolution")
    return _convolved(walk, call, x, channel, bias, out, zero)


@rule("embedding")
def _embedding(walk: Walk, call: Call) -> Result:
    weight = walk.fix(call["weight"], 0, "an entry of a vocabulary or position table")
    walk.freeze(call["indices"], "an index")
    last = len(call.shape) - 1
    return walk.value(call.shape, [Factor((last,), f.ids, f.zero) for f in weight.factors])


@rule("batch_norm", "instance_norm")
def _batch_norm(walk: Walk, call: Call) -> Result:
    x, rank = call["input"], len(call.shape)
    own = call.raw.get("training", call.raw.get("use_input_stats"))
    others = [d for d in range(rank) if d != 1]
    if own:
        spared = {0} if call.name == "instance_norm" else set()
        x = walk.fix_all(x, [d for d in others if d not in spared], "a mean is taken over it")
    names = ("weight", "bias", "running_mean", "running_var")
    stored = [call.get(n) for n in names]
    values = [x, *(v for v in stored if v is not None)]
    labels: list[Any] = [list(range(rank)), *[[1]] * (len(values) - 1)]
    linked = walk.link(values, labels, {1}, "a norm with a fixed parameter")
    affine = stored[0] is not None and stored[1] is not None
    zero = affine and _is_zero(stored[0], 0) and _is_zero(stored[1], 0)
    return walk.gather(call.shape, range(rank), linked, lambda k: zero and k.labels == (1,))


@rule("group_norm")
def _group_norm(walk: Walk, call: Call) -> Result:
    x, groups = call["input"], int(call.raw["num_groups"])
    weight, bias = call.get("weight"), call.get("bias")
    text = "group_norm takes a mean over it"
    x = walk.fix_all(x, range(2, len(x.shape)), text)
    x, f = walk.alone(x, 1)
    if f is not None and groups == 1:
        _normalised(walk, f, "group_norm")
    elif f is not None:
        parts = f.ids.reshape(groups, -1)
        walk.equal(parts, parts[:, :1], "channels of one norm group")
    values = [x, *(v for v in (weight, bias) if v is not None)]
    labels: list[Any] = [list(range(len(x.shape))), *[[1]] * (len(values) - 1)]
    linked = walk.link(values, labels, {1}, "a norm with a fixed parameter")
    zero = _is_zero(weight, 0) and (bias is None or _is_zero(bias, 0))
    return walk.gather(call.shape, range(len(x.shape)), linked,
                       lambda k: zero and k.labels == (1,))  # fmt: skip


def _normalised(walk: Walk, f: Factor, name: str) -> None:
    """A norm over a channel dimension: exact with the original divisor, if slots are zero."""
    if walk.norm == "pin":
        walk.classes.pin(f.ids, walk.node, f"{name} over it, fixed by norm: pin")
    elif not f.zero:
        walk.classes.pin(f.ids, walk.node, f"{name} over it, and a removed slot is not zero")


@rule("layer_norm", "rms_norm", "divisor_layer_norm")
def _layer_norm(walk: Walk, call: Call) -> Result:
    x, count = call.first, len(call.raw.get("normalized_shape", [1]))
    rank = len(x.shape)
    weight, bias = call.get("weight"), call.get("bias")
    last = range(rank - count, rank)
    if count > 1:
        x = walk.fix_all(x, last, f"{call.name} over several dimensions")
    else:
        x, f = walk.alone(x, rank - 1)
        if f is not None:
            _normalised(walk, f, call.name)
    values = [x, *(v for v in (weight, bias) if v is not None)]
    labels: list[Any] = [list(range(rank)), *[list(last)] * (len(values) - 1)]
    linked = walk.link(values, labels, set(last), "a norm with a fixed parameter")

    def zero(link: Linked) -> bool:
        if set(link.labels) & set(last):
            if call.name == "rms_norm":
                return bool(link.zero.get(0)) or _is_zero(weight, 0)
            return _is_zero(weight, 0) and (bias is None or _is_zero(bias, 0))
        return bias is None and bool(link.zero.get(0))  # 0 / sqrt(0 + eps) = 0

    return walk.gather(call.shape, range(rank), linked, zero)


def product(
    walk: Walk, call: Call, values: list[Value], labels: list[list[Any]], out: list[Any]
) -> Value:
    """A sum of products over the labels that are not in `out`."""
    every = dict.fromkeys(label for names in labels for label in names)
    linked = walk.link(values, labels, set(every), f"a fixed dimension of {call.name}")
    for label in (label for label in every if label not in out):
        contract(walk, linked, label, f"summed over by {call.name}, and no slot of it is zero")
    return walk.gather(call.shape, out, linked, lambda k: any(k.zero.values()))


def _matrix_labels(a: Value, b: Value) -> tuple[list[Any], list[Any], list[Any]]:
    rank = max(len(a.shape), len(b.shape))
    left: list[Any] = ["n", "k"][-min(len(a.shape), 2) :]
    right: list[Any] = ["k", "m"][: min(len(b.shape), 2)]
    batch = [[("batch", d + rank - len(v.shape)) for d in range(len(v.shape) - 2)] for v in (a, b)]
    longest = max(batch, key=len)
    out = [*longest, *(x for x in left if x == "n"), *(x for x in right if x == "m")]
    return [*batch[0], *left], [*batch[1], *right], out


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def _matmul(walk: Walk, call: Call) -> Result:
    a, b = list(call.raw)[:2]
    left, right, out = _matrix_labels(call[a], call[b])
    return product(walk, call, [call[a], call[b]], [left, right], out)


@rule("addmm", "baddbmm", "addmv")
def _added_product(walk: Walk, call: Call) -> Result:
    from graphwright.ir.channels.rules.elementwise import joined

    names = ("mat", "vec") if call.name == "addmv" else None
    names = names or (("batch1", "batch2") if call.name == "baddbmm" else ("mat1", "mat2"))
    a, b = call[names[0]], call[names[1]]
    left, right, out = _matrix_labels(a, b)
    return joined(
        walk, call, [product(walk, call, [a, b], [left, right], out), call["self"]], "all"
    )


@rule("einsum")
def _einsum(walk: Walk, call: Call) -> Result:
    values = call["tensors"]
    inputs, arrow, result = call.raw["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(values):
        raise UnknownCallError
    labels = [_letters(t, len(v.shape)) for t, v in zip(terms, values, strict=True)]
    out = _letters(result, len(call.shape))
    if any(len(set(names)) != len(names) for names in [*labels, out]):
        raise UnknownCallError
    return product(walk, call, values, labels, out)


def _letters(term: str, rank: int) -> list[Any]:
    if "..." not in term:
        return list(term)
    head, tail = term.split("...")
    hidden = rank - len(head) - len(tail)
    return [*head, *(("batch", hidden - i) for i in range(hidden)), *tail]


@rule("scaled_dot_product_attention")
def _attention(walk: Walk, call: Call) -> Result:
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    if call.raw.get("enable_gqa"):
        key, value = (_repeated(walk, v, query.shape[-3]) for v in (key, value))
    return _mixed(walk, call, (query, key, value), mask, None)


@rule("attention")
def _capped_attention(walk: Walk, call: Call) -> Result:
    query, mask, sinks = call["q"], call.get("mask"), call.get("sinks")
    key, value = (_repeated(walk, call[name], query.shape[-3]) for name in ("k", "v"))
    return _mixed(walk, call, (query, key, value), mask, sinks)


def _mixed(
    walk: Walk, call: Call, operands: tuple[Value, Value, Value], mask: Any, sinks: Any
) -> Result:
    query, key, value = operands
    rank = len(query.shape)
    text = "a token dimension of attention"
    query, key, value = (walk.fix(v, len(v.shape) - 2, text) for v in (query, key, value))

    def batch(v: Value) -> list[Any]:
        return [("batch", d + rank - len(v.shape)) for d in range(len(v.shape) - 2)]

    values = [query, key, value]
    labels: list[list[Any]] = [
        [*batch(query), "token", "qk"], [*batch(key), "key token", "qk"],
        [*batch(value), "key token", "v"],
    ]  # fmt: skip
    if isinstance(mask, Value):
        values.append(mask)
        lead = len(mask.shape) - 2
        labels.append([*batch(mask), None, None] if lead >= 0 else [None] * len(mask.shape))
    if isinstance(sinks, Value):
        values.append(sinks)
        labels.append([("batch", rank - 3)])
    every = {label for names in labels for label in names if label is not None}
    linked = walk.link(values, labels, every, "a fixed dimension of attention")
    contract(walk, linked, "qk", "summed over by attention, and no slot of it is zero")
    out = [*batch(query), "token", "v"]
    return walk.gather(call.shape, out, linked, lambda k: bool(k.zero.get(2)))


def _repeated(walk: Walk, x: Value, heads: int) -> Value:
    """Grouped queries: every key-value head serves several query heads."""
    dim = len(x.shape) - 3
    shape = list(x.shape)
    shape[dim] = heads
    f = x.at(dim)
    if f is not None:
        ids = np.repeat(f.ids, heads // x.shape[dim], axis=f.dims.index(dim))
        x = x.swap(f, Factor(f.dims, ids, f.zero))
    return Value(tuple(shape), x.factors)
