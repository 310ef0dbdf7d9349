"""Elementwise ops: arithmetic, comparison, casts."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter

aten = torch.ops.aten
prims = torch.ops.prims

BINARY = {
    aten.add: "Add",
    aten.sub: "Sub",
    aten.mul: "Mul",
    aten.pow: "Pow",
    aten.maximum: "Max",
    aten.minimum: "Min",
    aten.eq: "Equal",
    aten.lt: "Less",
    aten.le: "LessOrEqual",
    aten.gt: "Greater",
    aten.ge: "GreaterOrEqual",
    aten.logical_and: "And",
    aten.logical_or: "Or",
    aten.logical_xor: "Xor",
}
LOGICAL = {"And", "Or", "Xor"}

UNARY = {
    aten.abs: "Abs",
    aten.acos: "Acos",
    aten.acosh: "Acosh",
    aten.asin: "Asin",
    aten.asinh: "Asinh",
    aten.atan: "Atan",
    aten.atanh: "Atanh",
    aten.ceil: "Ceil",
    aten.cos: "Cos",
    aten.cosh: "Cosh",
    aten.erf: "Erf",
    aten.exp: "Exp",
    aten.floor: "Floor",
    aten.isnan: "IsNaN",
    aten.log: "Log",
    aten.neg: "Neg",
    aten.reciprocal: "Reciprocal",
    aten.round: "Round",
    aten.sigmoid: "Sigmoid",
    aten.sign: "Sign",
    aten.sin: "Sin",
    aten.sinh: "Sinh",
    aten.sqrt: "Sqrt",
    aten.tan: "Tan",
    aten.tanh: "Tanh",
    aten.hardswish: "HardSwish",
}
FLOAT_RESULT = {"Abs", "Neg", "Sign", "IsNaN"}


def operand_dtype(node: fx.Node, args: tuple[Any, ...]) -> torch.dtype:
    """The dtype in which torch computes an elementwise op on these operands."""
    fakes = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    result = fakes[0]
    if len(fakes) == 1:
        return result.dtype if isinstance(result, torch.Tensor) else node.meta["val"].dtype
    with_tensor = [f for f in fakes if isinstance(f, torch.Tensor)]
    plain = [
        1 if isinstance(f, torch.SymInt) else 1.0 if isinstance(f, torch.SymFloat) else f
        for f in fakes
        if not isinstance(f, torch.Tensor)
    ]
    if not with_tensor:
        return node.meta["val"].dtype  # type: ignore[no-any-return]
    # result_type wants real tensors or numbers; empty stand-ins of the same rank class will do.
    stand_ins: list[Any] = [
        torch.empty((1,) if f.dim() else (), dtype=f.dtype) for f in with_tensor
    ] + plain
    found = stand_ins[0]
    if len(stand_ins) == 1:
        return found.dtype  # type: ignore[no-any-return]
    dtype = torch.result_type(stand_ins[0], stand_ins[1])
    for other in stand_ins[2:]:
        dtype = torch.result_type(torch.empty((1,), dtype=dtype), other)
    return dtype


def binary(e: Emitter, node: fx.Node, kind: str, a: Any, b: Any) -> ir.Value:
    """A broadcasting op on two operands in torch's promoted dtype."""
    dtype = torch.bool if kind in LOGICAL else operand_dtype(node, (a, b))
    out = node.meta["val"].dtype
    if out.is_floating_point and not dtype.is_floating_point:
        dtype = out
    if dtype == torch.bool and kind in ("Add", "Max"):
        kind = "Or"
    elif dtype == torch.bool and kind in ("Mul", "Min"):
        kind = "And"
    elif dtype == torch.bool and kind not in ("Equal", *LOGICAL):
        dtype = torch.int32
    if dtype == torch.bfloat16:
        # No CPU kernels; torch computes in float32 too, and rounds the result.
        wide = e.op(kind, *(e.cast(e.tensor(x, dtype), dtype, torch.float32) for x in (a, b)))
        return e.cast(wide, torch.float32, dtype) if out == dtype else wide
    return e.op(kind, e.tensor(a, dtype), e.tensor(b, dtype))  # type: ignore[no-any-return]


def _scaled(e: Emitter, node: fx.Node, b: Any, alpha: Any, a: Any) -> Any:
    if alpha == 1:
        return None
    dtype = operand_dtype(node, (a, b))
    return e.op("Mul", e.tensor(b, dtype), e.constant(alpha, dtype))


@translates(
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    prims.add.default,
    prims.sub.default,
)
def add(e: Emitter, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Any:
    kind = "Add" if node.target in (aten.add.Tensor, aten.add.Scalar, prims.add.default) else "Sub"
    if kind == "Add" and alpha == 1 and b == 0 and _keeps(node, a):
        return e.values[a]
    scaled = _scaled(e, node, b, alpha, a)
    if scaled is None:
        return binary(e, node, kind, a, b)
    return e.op(kind, e.tensor(a, operand_dtype(node, (a, b))), scaled)


def _keeps(node: fx.Node, a: Any) -> bool:
    return (
        isinstance(a, fx.Node)
        and isinstance(a.meta["val"], torch.Tensor)
        and a.meta["val"].dtype == node.meta["val"].dtype
    )


def _binary_entry(kind: str) -> Any:
    def translate(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
        return binary(e, node, kind, a, b)

    return translate


for _packet, _kind in BINARY.items():
    if _kind in ("Add", "Sub"):
        continue
    for _overload in _packet.overloads():
        if _overload in ("default", "Tensor", "Scalar", "Tensor_Tensor", "Tensor_Scalar"):
            translates(getattr(_packet, _overload))(_binary_entry(_kind))
    if hasattr(prims, str(_packet).removeprefix("aten.")):
        translates(getattr(prims, str(_packet).removeprefix("aten.")).default)(_binary_entry(_kind))
translates(aten.min.other)(_binary_entry("Min"))
translates(aten.max.other)(_binary_entry("Max"))


@translates(aten.pow.Scalar)
def pow_scalar(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    return binary(e, node, "Pow", a, b)


@translates(aten.ne.Tensor, aten.ne.Scalar)
def not_equal(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    if b == 0 and isinstance(a, fx.Node) and a.meta["val"].dtype != torch.bool:
        return e.op("Cast", e.values[a], to=int(ir.DataType.BOOL))
    return e.op("Not", binary(e, node, "Equal", a, b))


def _bitwise(kind: str) -> Any:
    def translate(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
        dtype = node.meta["val"].dtype
        name = kind if dtype == torch.bool else f"Bitwise{kind}"
        return e.op(name, e.tensor(a, dtype), e.tensor(b, dtype))

    return translate


for _name in ("And", "Or", "Xor"):
    translates(getattr(prims, f"bitwise_{_name.lower()}").default)(_bitwise(_name))
    for _logical in (f"bitwise_{_name.lower()}", f"__{_name.lower()}__"):
        for _overload in ("Tensor", "Scalar"):
            translates(getattr(getattr(aten, _logical), _overload))(_bitwise(_name))


@translates(aten.bitwise_not.default, aten.logical_not.default)
def logical_not(e: Emitter, node: fx.Node, a: Any) -> Any:
    if node.target is aten.bitwise_not.default and node.meta["val"].dtype != torch.bool:
        return e.op("BitwiseNot", e.values[a])
    return e.op("Not", e.tensor(a, torch.bool))


@translates(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, prims.div.default)
def div(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = operand_dtype(node, (a, b))
    dtype = dtype if dtype.is_floating_point else node.meta["val"].dtype
    if isinstance(b, int | float) and b == 1:
        return e.tensor(a, dtype)
    return e.op("Div", e.tensor(a, dtype), e.tensor(b, dtype))


@translates(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(e: Emitter, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return floor_divide(e, node, a, b)
    if rounding_mode is None:
        return div(e, node, a, b)
    dtype = node.meta["val"].dtype
    quotient = e.op("Div", e.tensor(a, dtype), e.tensor(b, dtype))
    if not dtype.is_floating_point:
        return quotient
    return e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))


@translates(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    x, y = e.tensor(a, dtype), e.tensor(b, dtype)
    if not dtype.is_floating_point:
        return e.op("Div", e.op("Sub", x, e.op("Mod", x, y)), y)
    # Through the remainder: 0.3 / 0.1 rounds up to 3, and 0.3 // 0.1 is 2.
    plain = e.op("Div", x, y)
    exact = e.op("Round", e.op("Div", e.op("Sub", x, modulo(e, x, y, dtype)), y))
    return e.op("Where", e.op("Equal", y, e.constant(0.0, dtype)), plain, exact)


def modulo(e: Emitter, x: ir.Value, y: ir.Value, dtype: torch.dtype) -> ir.Value:
    """The remainder of floats with the divisor's sign."""
    zero = e.constant(0.0, dtype)
    rest = e.op("Mod", x, y, fmod=1)
    other_sign = e.op("Xor", e.op("Less", rest, zero), e.op("Less", y, zero))
    other_sign = e.op("And", other_sign, e.op("Not", e.op("Equal", rest, zero)))
    return e.op("Where", other_sign, e.op("Add", rest, y), rest)  # type: ignore[no-any-return]


@translates(
    aten.remainder.Scalar,
    aten.remainder.Tensor,
    aten.remainder.Scalar_Tensor,
    aten.fmod.Scalar,
    aten.fmod.Tensor,
    prims.remainder.default,
    prims.fmod.default,
)
def remainder(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    x, y = e.tensor(a, dtype), e.tensor(b, dtype)
    if "fmod" in str(node.target):
        return e.op("Mod", x, y, fmod=1)
    if not dtype.is_floating_point:
        return e.op("Mod", x, y)
    return modulo(e, x, y, dtype)


def _unary_entry(kind: str) -> Any:
    def translate(e: Emitter, node: fx.Node, a: Any) -> Any:
        dtype = a.meta["val"].dtype if kind in FLOAT_RESULT else node.meta["val"].dtype
        return e.op(kind, e.tensor(a, dtype))

    return translate


for _packet, _kind in UNARY.items():
    translates(_packet.default)(_unary_entry(_kind))
    _name = str(_packet).removeprefix("aten.")
    if hasattr(prims, _name):  # torch's own decompositions come down to these
        translates(getattr(prims, _name).default)(_unary_entry(_kind))


@translates(aten.relu.default)
def relu(e: Emitter, node: fx.Node, a: Any) -> Any:
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return e.op("Relu", e.values[a])
    return e.op("Max", e.values[a], e.constant(0, dtype))


@translates(aten.rsqrt.default)
def rsqrt(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Reciprocal", e.op("Sqrt", e.tensor(a, node.meta["val"].dtype)))


@translates(aten.square.default)
def square(e: Emitter, node: fx.Node, a: Any) -> Any:
    return e.op("Mul", e.values[a], e.values[a])


@translates(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp(e: Emitter, node: fx.Node, a: Any, b: Any, weight: Any) -> Any:
    dtype = node.meta["val"].dtype
    delta = e.op("Sub", e.values[b], e.values[a])
    return e.op("Add", e.values[a], e.op("Mul", delta, e.tensor(weight, dtype)))


@translates(aten.addcmul.default)
def addcmul(e: Emitter, node: fx.Node, a: Any, b: Any, c: Any, value: Any = 1) -> Any:
    product = e.op("Mul", e.values[b], e.values[c])
    if value != 1:
        product = e.op("Mul", product, e.constant(value, node.meta["val"].dtype))
    return e.op("Add", e.values[a], product)
