"""Rules of elementwise operators: equal ids, and where a removed slot stays zero."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphwright.ir.channels.values import Result, Value
from graphwright.ir.channels.walk import Call, Linked, UnknownCallError, Walk, rule


def join(walk: Walk, call: Call, values: list[Value]) -> list[Linked]:
    """Broadcasts operands and makes their dimensions equal; labels are result dimensions."""
    rank = len(call.shape)
    labels = [[d + rank - len(v.shape) for d in range(len(v.shape))] for v in values]
    return walk.link(values, labels, text=f"meets a fixed dimension in {call.name}")


def joined(walk: Walk, call: Call, values: list[Value], mode: str) -> Value:
    """The result of an elementwise call; `mode` says when a removed slot of it is zero."""
    linked = join(walk, call, values)

    def zero(link: Linked) -> bool:
        if mode == "all":
            return len(link.zero) == len(values) and all(link.zero.values())
        if mode == "any":
            return any(link.zero.values())
        return mode == "first" and link.zero.get(0, False)

    return walk.gather(call.shape, range(len(call.shape)), linked, zero)


def _is_zero(argument: Any) -> bool:
    return argument is None or (isinstance(argument, int | float) and argument == 0)


@rule("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin", "logical_or", "bitwise_or",
      "logical_xor", "bitwise_xor", "hypot")  # fmt: skip
def _sum(walk: Walk, call: Call) -> Result:
    values = [v for v in (call["self"], call["other"]) if isinstance(v, Value)]
    scalars = [a for a in (call.raw["self"], call.raw["other"]) if not isinstance(a, fx.Node)]
    plain = len(values) + len(scalars) == 2 and all(_is_zero(a) for a in scalars)
    return joined(walk, call, values, "all" if plain else "never")


@rule("lerp")
def _between(walk: Walk, call: Call) -> Result:
    """self + weight * (end - self): zero where both ends are."""
    values = [v for v in (call["self"], call["end"], call["weight"]) if isinstance(v, Value)]
    linked = join(walk, call, values)
    return walk.gather(call.shape, range(len(call.shape)), linked,
                       lambda k: all(k.zero.get(i, False) for i in (0, 1)))  # fmt: skip


@rule("mul", "logical_and", "bitwise_and")
def _product(walk: Walk, call: Call) -> Result:
    return joined(walk, call, [v for v in (call["self"], call["other"]) if isinstance(v, Value)],
                  "any")  # fmt: skip


@rule("div", "floor_divide", "true_divide", "remainder", "fmod")
def _quotient(walk: Walk, call: Call) -> Result:
    values = [v for v in (call["self"], call["other"]) if isinstance(v, Value)]
    if isinstance(call["other"], Value):
        _keep(walk, call["other"], "a divisor would become zero")
    first = "first" if isinstance(call["self"], Value) else "never"
    return joined(walk, call, values, first)


def _keep(walk: Walk, value: Value, text: str) -> None:
    """Pins slots that would be zero where zero is not in the domain."""
    for f in value.factors:
        if f.zero:
            walk.classes.pin(f.ids, walk.node, text)


@rule("relu", "relu6", "gelu", "silu", "mish", "tanh", "hardswish", "leaky_relu", "elu", "selu",
      "celu", "abs", "neg", "sqrt", "square", "sin", "sinh", "asinh", "atan", "asin", "tan",
      "sign", "floor", "ceil", "round", "trunc", "frac", "erf", "log1p", "expm1", "softsign",
      "softshrink", "hardshrink", "tanhshrink", "dropout", "feature_dropout", "alpha_dropout",
      "to", "clone", "contiguous", "alias", "detach", "nan_to_num", "positive", "_to_copy",
      "bool", "float", "type_as", "lift_fresh_copy", "deg2rad", "rad2deg")  # fmt: skip
def _odd(walk: Walk, call: Call) -> Result:
    return call.first


@rule("sigmoid", "hardsigmoid", "exp", "exp2", "cos", "cosh", "acos", "softplus", "log_sigmoid",
      "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "threshold", "erfc", "sgn",
      "celu_", "logit")  # fmt: skip
def _even(walk: Walk, call: Call) -> Result:
    return call.first.flags(False)


@rule("log", "log2", "log10", "rsqrt", "reciprocal", "digamma", "lgamma")
def _undefined_at_zero(walk: Walk, call: Call) -> Result:
    _keep(walk, call.first, f"{call.name} of a slot that would become zero")
    return call.first.flags(False)


@rule("pow")
def _power(walk: Walk, call: Call) -> Result:
    base, exponent = call["self"], call["exponent"]
    if isinstance(base, Value) and isinstance(exponent, int | float):
        if exponent < 0:
            _keep(walk, base, "a negative power of a slot that would become zero")
        return base.flags(exponent > 0)
    values = [v for v in (base, exponent) if isinstance(v, Value)]
    return joined(walk, call, values, "never")


@rule("hardtanh", "clamp", "clamp_min", "clamp_max", "clip")
def _clamp(walk: Walk, call: Call) -> Result:
    low = call.raw.get("min_val", call.raw.get("min"))
    high = call.raw.get("max_val", call.raw.get("max"))
    values = [v for v in (call.first, call.get("min"), call.get("max")) if isinstance(v, Value)]
    if len(values) > 1:
        return joined(walk, call, values, "never")
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return call.first.flags(False)  # a bound that is a size
    holds = (low is None or low <= 0) and (high is None or high >= 0)
    return call.first.flags(holds)


@rule("eq", "ne", "lt", "le", "gt", "ge", "atan2", "isclose", "xlogy", "logaddexp")
def _compare(walk: Walk, call: Call) -> Result:
    values = [v for v in (call.first, call.get("other")) if isinstance(v, Value)]
    return joined(walk, call, values, "never")


@rule("where")
def _where(walk: Walk, call: Call) -> Result:
    names = ("condition", "self", "other")
    if any(n not in call.raw for n in names):
        raise UnknownCallError
    values = [v for v in (call[n] for n in names) if isinstance(v, Value)]
    return joined(walk, call, values, "never")


@rule("masked_fill")
def _masked_fill(walk: Walk, call: Call) -> Result:
    values = [v for v in (call["self"], call["mask"], call["value"]) if isinstance(v, Value)]
    return joined(walk, call, values, "first" if _is_zero(call.raw["value"]) else "never")


@rule("addcmul", "addcdiv")
def _addcmul(walk: Walk, call: Call) -> Result:
    if call.name == "addcdiv":
        _keep(walk, call["tensor2"], "a divisor would become zero")
    return joined(walk, call, [call["self"], call["tensor1"], call["tensor2"]], "all")


@rule("prelu")
def _prelu(walk: Walk, call: Call) -> Result:
    x, weight = call["self"], call["weight"]
    labels: list[int | None] = [None] * len(weight.shape)  # one slope for all
    if weight.shape not in ((), (1,)):
        labels = [1 if len(x.shape) > 1 else 0]
    names = range(len(x.shape))
    linked = walk.link([x, weight], [names, labels])
    return walk.gather(call.shape, names, linked, lambda k: k.zero.get(0, False))


@rule("glu")
def _glu(walk: Walk, call: Call) -> Result:
    from graphwright.ir.channels.rules.shape import _cut

    x, dim = call.first, call.dims()[0]
    half = x.shape[dim] // 2
    parts = [_cut(walk, x, dim, 0, half), _cut(walk, x, dim, half, 2 * half)]
    return joined(walk, call, parts, "first")
