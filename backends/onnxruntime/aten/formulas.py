"""Elementwise functions that ONNX lacks, as formulas that keep their digits and special values."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.pointwise import operand_dtype
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter

aten = torch.ops.aten
prims = torch.ops.prims


@translates(aten.expm1.default)
def expm1(e: Emitter, node: fx.Node, a: Any) -> Any:
    # exp(x) - 1 loses digits near zero; 2 sinh(x/2) exp(x/2) does not, but has 0 * inf far off.
    dtype = node.meta["val"].dtype
    x = e.tensor(a, dtype)
    half = e.op("Mul", x, e.constant(0.5, dtype))
    near = e.op("Mul", e.op("Mul", e.op("Sinh", half), e.op("Exp", half)), e.constant(2.0, dtype))
    far = e.op("Sub", e.op("Exp", x), e.constant(1.0, dtype))
    small = e.op("Less", e.op("Abs", x), e.constant(1.0, dtype))
    return e.op("Where", small, near, far)


@translates(aten.log1p.default)
def log1p(e: Emitter, node: fx.Node, a: Any) -> Any:
    # log(1 + x) loses digits near zero; 2 atanh(x / (2 + x)) does not.
    dtype = node.meta["val"].dtype
    x = e.tensor(a, dtype)
    ratio = e.op("Div", x, e.op("Add", x, e.constant(2.0, dtype)))
    near = e.op("Mul", e.op("Atanh", ratio), e.constant(2.0, dtype))
    far = e.op("Log", e.op("Add", x, e.constant(1.0, dtype)))
    small = e.op("Less", e.op("Abs", x), e.constant(0.5, dtype))
    return e.op("Where", small, near, far)


@translates(aten.log2.default, aten.log10.default)
def log_base(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = node.meta["val"].dtype
    base = 2 if node.target is aten.log2.default else 10
    return e.op("Mul", e.op("Log", e.tensor(a, dtype)), e.constant(1 / math.log(base), dtype))


@translates(aten.exp2.default)
def exp2(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Pow", e.constant(2, dtype), e.tensor(a, dtype))


@translates(aten.erfc.default, prims.erfc.default)
def erfc(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Sub", e.constant(1.0, dtype), e.op("Erf", e.tensor(a, dtype)))


def truncated(e: Emitter, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """A float rounded towards zero; the sign of zero is not kept."""
    down, up = e.op("Floor", x), e.op("Ceil", x)
    negative = e.op("Less", x, e.constant(0.0, dtype))
    return e.op("Where", negative, up, down)  # type: ignore[no-any-return]


@translates(aten.trunc.default, prims.trunc.default)
def trunc(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = node.meta["val"].dtype
    return truncated(e, e.tensor(a, dtype), dtype) if dtype.is_floating_point else e.values[a]


@translates(aten.round.decimals)
def round_decimals(e: Emitter, node: fx.Node, a: Any, decimals: int = 0) -> Any:
    dtype = node.meta["val"].dtype
    unit = e.constant(10.0 ** abs(decimals), dtype)
    there, back = ("Mul", "Div") if decimals >= 0 else ("Div", "Mul")
    return e.op(back, e.op("Round", e.op(there, e.tensor(a, dtype), unit)), unit)


def is_negative(e: Emitter, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Whether the sign bit is set; true for minus zero."""
    zero = e.constant(0, dtype)
    below = e.op("Less", x, zero)
    if not dtype.is_floating_point:
        return below  # type: ignore[no-any-return]
    minus_zero = e.op("Less", e.op("Reciprocal", x), zero)
    return e.op("Or", below, e.op("And", e.op("Equal", x, zero), minus_zero))  # type: ignore[no-any-return]


@translates(aten.signbit.default, prims.signbit.default)
def signbit(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = a.meta["val"].dtype
    if dtype == torch.bool:
        return e.op("And", e.values[a], e.constant(False, torch.bool))
    return is_negative(e, e.values[a], dtype)


@translates(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    size = e.op("Abs", e.tensor(a, dtype))
    return e.op("Where", is_negative(e, e.tensor(b, dtype), dtype), e.op("Neg", size), size)


@translates(aten.atan2.default, prims.atan2.default)
def atan2(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    return angle_of(e, e.tensor(b, dtype), e.tensor(a, dtype), dtype)


def angle_of(e: Emitter, x: ir.Value, y: ir.Value, dtype: torch.dtype) -> ir.Value:
    """The angle of (x, y), from -pi to pi, by the smaller of the two quotients."""
    zero, one = e.constant(0.0, dtype), e.constant(1.0, dtype)
    width, height = e.op("Abs", x), e.op("Abs", y)
    flat = e.op("GreaterOrEqual", width, height)
    small, large = (
        e.op("Where", flat, height, width),
        e.op("Where", flat, width, height),
    )
    # 0 / 0 is angle 0, inf / inf is pi / 4.
    even = e.op("Equal", small, large)
    at_origin = e.op("Equal", large, zero)
    ratio = e.op("Where", even, one, e.op("Div", small, large))
    base = e.op("Atan", e.op("Where", at_origin, zero, ratio))
    first = e.op("Where", flat, base, e.op("Sub", e.constant(math.pi / 2, dtype), base))
    upper = e.op(
        "Where", is_negative(e, x, dtype), e.op("Sub", e.constant(math.pi, dtype), first), first
    )
    return e.op("Where", is_negative(e, y, dtype), e.op("Neg", upper), upper)  # type: ignore[no-any-return]


@translates(aten.hypot.default, prims.hypot.default)
def hypot(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    # By the quotient: squares of large numbers overflow.
    dtype = node.meta["val"].dtype
    x, y = e.op("Abs", e.tensor(a, dtype)), e.op("Abs", e.tensor(b, dtype))
    large, small, one = e.op("Max", x, y), e.op("Min", x, y), e.constant(1.0, dtype)
    ratio = e.op("Where", e.op("Equal", small, large), one, e.op("Div", small, large))
    return e.op("Mul", large, e.op("Sqrt", e.op("Add", one, e.op("Mul", ratio, ratio))))


@translates(aten.fmax.default, prims.fmax.default, aten.fmin.default, prims.fmin.default)
def fmax(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    x, y = e.tensor(a, dtype), e.tensor(b, dtype)
    best = e.op("Max" if "fmax" in str(node.target) else "Min", x, y)
    if not dtype.is_floating_point:
        return best
    best = e.op("Where", e.op("IsNaN", y), x, best)
    return e.op("Where", e.op("IsNaN", x), y, best)


@translates(aten.isfinite.default)
def isfinite(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = a.meta["val"].dtype
    if not dtype.is_floating_point:
        return e.op("Equal", e.values[a], e.values[a])
    special = e.op("Or", e.op("IsInf", e.values[a]), e.op("IsNaN", e.values[a]))
    return e.op("Not", special)


@translates(aten.isinf.default)
def isinf(e: Emitter, node: fx.Node, a: Any) -> Any:
    if not a.meta["val"].dtype.is_floating_point:
        return e.op("Not", e.op("Equal", e.values[a], e.values[a]))
    return e.op("IsInf", e.values[a])


@translates(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(e: Emitter, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Any:
    dtype = operand_dtype(node, (a, b))
    x = e.tensor(a, dtype)
    if alpha != 1:
        x = e.op("Mul", x, e.constant(alpha, dtype))
    return e.op("Sub", e.tensor(b, dtype), x)


def _shift(direction: str) -> Any:
    def translate(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
        # By powers of two: ONNX shifts unsigned numbers only.
        dtype = node.meta["val"].dtype
        two, count = e.constant(2, dtype), e.tensor(b, dtype)
        power = e.op("Pow", two, count)
        x = e.tensor(a, dtype)
        if direction == "LEFT":
            return e.op("Mul", x, power)
        return e.op("Div", e.op("Sub", x, e.op("Mod", x, power)), power)

    return translate


for _packet, _direction in (
    (aten.bitwise_left_shift, "LEFT"),
    (aten.__lshift__, "LEFT"),
    (aten.bitwise_right_shift, "RIGHT"),
    (aten.__rshift__, "RIGHT"),
):
    for _overload in ("Tensor", "Scalar", "Tensor_Scalar"):
        if hasattr(_packet, _overload):
            translates(getattr(_packet, _overload))(_shift(_direction))


@translates(aten.float_power.Tensor_Tensor, aten.float_power.Tensor_Scalar, aten.float_power.Scalar)
def float_power(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Pow", e.tensor(a, dtype), e.tensor(b, dtype))


@translates(aten.nan_to_num.default)
def nan_to_num(
    e: Emitter, node: fx.Node, a: Any, nan: Any = None, posinf: Any = None, neginf: Any = None
) -> Any:
    dtype = node.meta["val"].dtype
    value = e.tensor(a, dtype)
    if not dtype.is_floating_point:
        return value
    bounds = torch.finfo(dtype)
    for special, number in (
        (e.op("IsNaN", value), 0.0 if nan is None else nan),
        (e.op("IsInf", value, detect_negative=0), bounds.max if posinf is None else posinf),
        (e.op("IsInf", value, detect_positive=0), bounds.min if neginf is None else neginf),
    ):
        value = e.op("Where", special, e.constant(float(number), dtype), value)
    return value


@translates(aten.angle.default)
def angle(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = node.meta["val"].dtype
    x = e.tensor(a, dtype)
    below = e.op("Less", x, e.constant(0.0, dtype))
    turned = e.op("Where", below, e.constant(math.pi, dtype), e.constant(0.0, dtype))
    return e.op("Where", e.op("IsNaN", x), x, turned)
