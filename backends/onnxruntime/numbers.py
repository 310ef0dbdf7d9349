"""Arithmetic on sizes at run time: whole numbers in int64, all others in float64, as Python has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import sympy
import torch
from torch.utils._sympy import functions as sym

if TYPE_CHECKING:
    from graphwright.backends.onnxruntime.emitter import Emitter

IN_DOUBLE = {"sqrt": "Sqrt", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tanh": "Tanh"}
IN_FLOAT = {
    "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh",
    "asinh": "Asinh",
}  # fmt: skip
"""Functions that ONNX Runtime computes in float64, and in float32 only."""


class NoFormError(Exception):
    """An expression that has no form at run time."""


def whole(e: Emitter, expr: Any) -> ir.Value:
    """A whole number as a 1-D int64 value with one element.

    Raises:
        NoFormError: there is no ONNX form for it.
    """
    for kinds, make in (*SHARED, *WHOLE):
        if isinstance(expr, kinds):
            return make(e, e.size_of, expr)
    raise NoFormError(str(expr))


def number(e: Emitter, expr: Any) -> ir.Value:
    """Any number as a 1-D float64 value with one element.

    Raises:
        NoFormError: there is no ONNX form for it.
    """
    if expr.is_number:
        return e.constant([float(expr)], torch.float64)
    if expr in e.numbers:
        return e.numbers[expr]
    if expr.is_integer or any(isinstance(expr, kinds) for kinds, _ in WHOLE):
        return e.cast(e.size_of(expr), torch.int64, torch.float64)
    for kinds, make in (*SHARED, *FRACTIONS):
        if isinstance(expr, kinds):
            return make(e, lambda arg: number(e, arg), expr)
    return _function(e, expr)


Part = Callable[[Any], ir.Value]
"""Makes the value of a part of an expression, in the kind of number that is being made."""


def _chained(name: str) -> Callable[[Emitter, Part, Any], ir.Value]:
    """An operator of two values, over all the parts of an expression."""

    def make(e: Emitter, part: Part, expr: Any) -> ir.Value:
        return _chain(e, name, [part(arg) for arg in expr.args])

    return make


def _floor_div(e: Emitter, part: Part, expr: Any) -> ir.Value:
    return _floor(e, part(expr.args[0]), part(expr.args[1]))


def _ceil_div(e: Emitter, part: Part, expr: Any) -> ir.Value:
    # The floor of the negative, negated.
    return e.op("Neg", _floor(e, e.op("Neg", part(expr.args[0])), part(expr.args[1])))  # type: ignore[no-any-return]


def _shift(e: Emitter, part: Part, expr: Any) -> ir.Value:
    power = e.op("Pow", e.ints(2), part(expr.args[1]))
    if isinstance(expr, sym.LShift):
        return e.op("Mul", part(expr.args[0]), power)  # type: ignore[no-any-return]
    return _floor(e, part(expr.args[0]), power)


def _rounded(name: str) -> Callable[[Emitter, Part, Any], ir.Value]:
    """A whole number from a fraction; without a name what is behind the point is cut off."""

    def make(e: Emitter, part: Part, expr: Any) -> ir.Value:
        value = number(e, expr.args[0])
        value = e.op(name, value) if name else value
        return e.cast(value, torch.float64, torch.int64)

    return make


def _truncated(e: Emitter, part: Part, expr: Any) -> ir.Value:
    return e.cast(_rounded("")(e, part, expr), torch.int64, torch.float64)


def _to_digits(e: Emitter, part: Part, expr: Any) -> ir.Value:
    unit = e.constant([10.0 ** int(expr.args[1])], torch.float64)
    return e.op("Div", e.op("Round", e.op("Mul", part(expr.args[0]), unit)), unit)  # type: ignore[no-any-return]


def _choice(e: Emitter, part: Part, expr: Any) -> ir.Value:
    if isinstance(expr, sym.Where):
        condition, first, second = expr.args
        return e.op("Where", truth(e, condition), part(first), part(second))  # type: ignore[no-any-return]
    *cases, last = expr.args
    result = part(last[0])
    for value, condition in reversed(cases):
        result = e.op("Where", truth(e, condition), part(value), result)
    return result


SHARED: tuple[tuple[Any, Callable[[Emitter, Part, Any], ir.Value]], ...] = (
    (sympy.Add, _chained("Add")),
    (sympy.Mul, _chained("Mul")),
    (sympy.Max | sym.Max, _chained("Max")),
    (sympy.Min | sym.Min, _chained("Min")),
    (sympy.Pow | sym.PowByNatural | sym.FloatPow, _chained("Pow")),
    (sympy.Abs, _chained("Abs")),
    (sym.Identity | sym.ToFloat, lambda e, part, expr: part(expr.args[0])),
    (sym.Where | sympy.Piecewise, _choice),
)
"""Kinds of expressions that are the same in whole numbers and in fractions."""
WHOLE: tuple[tuple[Any, Callable[[Emitter, Part, Any], ir.Value]], ...] = (
    (sym.FloorDiv | sym.CleanDiv, _floor_div),
    (sym.CeilDiv, _ceil_div),
    (sym.Mod | sym.PythonMod, _chained("Mod")),
    (sym.LShift | sym.RShift, _shift),
    (sym.BitwiseFn_bitwise_and, _chained("BitwiseAnd")),
    (sym.BitwiseFn_bitwise_or, _chained("BitwiseOr")),
    (sym.BitwiseFn_bitwise_xor, _chained("BitwiseXor")),
    (sym.TruncToInt, _rounded("")),
    (sym.FloorToInt, _rounded("Floor")),
    (sym.CeilToInt, _rounded("Ceil")),
    (sym.RoundToInt, _rounded("Round")),
)
FRACTIONS: tuple[tuple[Any, Callable[[Emitter, Part, Any], ir.Value]], ...] = (
    (sym.FloatTrueDiv | sym.IntTrueDiv, _chained("Div")),
    (sym.TruncToFloat, _truncated),
    (sym.RoundDecimal, _to_digits),
)


def _function(e: Emitter, expr: Any) -> ir.Value:
    name = type(expr).__name__.removeprefix("OpaqueUnaryFn_")
    if name == "log2":
        ln2 = number(e, sympy.log(2))
        return e.op("Div", e.op("Log", number(e, expr.args[0])), ln2)  # type: ignore[no-any-return]
    if name in IN_DOUBLE:
        return e.op(IN_DOUBLE[name], number(e, expr.args[0]))  # type: ignore[no-any-return]
    if name in IN_FLOAT:
        narrow = e.cast(number(e, expr.args[0]), torch.float64, torch.float32)
        return e.cast(e.op(IN_FLOAT[name], narrow), torch.float32, torch.float64)
    raise NoFormError(str(expr))


def truth(e: Emitter, expr: Any) -> ir.Value:
    """A condition on sizes as a 1-D boolean value with one element.

    Raises:
        NoFormError: there is no ONNX form for it.
    """
    if expr in (sympy.true, sympy.false):
        return e.constant([bool(expr)], torch.bool)
    if isinstance(expr, sympy.And | sympy.Or):
        name = "And" if isinstance(expr, sympy.And) else "Or"
        return _chain(e, name, [truth(e, arg) for arg in expr.args])
    if isinstance(expr, sympy.Not):
        return e.op("Not", truth(e, expr.args[0]))  # type: ignore[no-any-return]
    names = {
        sympy.Eq: "Equal", sympy.Lt: "Less", sympy.Le: "LessOrEqual", sympy.Gt: "Greater",
        sympy.Ge: "GreaterOrEqual",
    }  # fmt: skip
    for kind, name in names.items():
        if isinstance(expr, kind):
            return e.op(name, number(e, expr.args[0]), number(e, expr.args[1]))  # type: ignore[no-any-return]
    if isinstance(expr, sympy.Ne):
        same = e.op("Equal", number(e, expr.args[0]), number(e, expr.args[1]))
        return e.op("Not", same)  # type: ignore[no-any-return]
    raise NoFormError(str(expr))


def _chain(e: Emitter, name: str, values: list[ir.Value]) -> ir.Value:
    if len(values) == 1:
        return e.op(name, values[0])  # type: ignore[no-any-return]
    result = values[0]
    for value in values[1:]:
        result = e.op(name, result, value)
    return result


def _floor(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    # ONNX integer division truncates; taking the remainder off first makes it floor.
    return e.op("Div", e.op("Sub", a, e.op("Mod", a, b)), b)  # type: ignore[no-any-return]
