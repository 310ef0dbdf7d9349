"""Arithmetic on sizes passes; anything that could run code, or without end, does not."""

from __future__ import annotations

import pytest

from graphwright.ir.files.size_expressions import is_plain_expression, is_plain_guard

SYMBOL = "Symbol('s77', positive=True, integer=True)"


@pytest.mark.parametrize(
    "text",
    [
        "s77", "Integer(3)", f"Mul(Integer(2), {SYMBOL})", f"FloorDiv({SYMBOL}, Integer(2))",
        f"Max(Integer(1), Add({SYMBOL}, Integer(-1)))", "u0", "2*s0 + 1", "int_oo", "-int_oo",
        f"TruncToInt(Mul(Float('0.5', precision=53), ToFloat({SYMBOL})))",
        f"Max(Integer(1), Function('TruncToInt')(Mul(Float('0.5', precision=53), {SYMBOL})))",
        f"FloatTrueDiv(ToFloat({SYMBOL}), Float('3.7000000000000002', precision=53))",
        f"FloatPow(ToFloat({SYMBOL}), Float('0.5', precision=53))",
        f"FloatPow(Float('2.0', precision=53), ToFloat(Mul(Integer(-1), {SYMBOL})))",
        f"OpaqueUnaryFn_sqrt(ToFloat({SYMBOL}))", f"PowByNatural({SYMBOL}, Integer(3))",
        "RoundDecimal(Float('1e-05', precision=53), Integer(1))", f"Pow({SYMBOL}, Rational(1, 2))",
        f"CeilToInt(IntTrueDiv({SYMBOL}, Integer(2)))", f"PowByNatural(Integer(2), {SYMBOL})",
        f"Piecewise(ExprCondPair(Integer(1), StrictGreaterThan({SYMBOL}, Integer(8))))",
    ],
)  # fmt: skip
def test_arithmetic_on_sizes_passes(text: str) -> None:
    assert is_plain_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "open('x')", "s77.__class__", "Symbol('s77').func", "exec", "lambda: 1",
        "'a' + 'b'", "[1]", "{}", "s77; s78", "Integer(1) if s0 else s1", "Symbol(\"x\")",
        "Integer(3)\nimport os", "f'{s77}'", "eval", "print(s0)",
        "Function('eval')(Integer(1))", "Float('__import__', precision=53)", "Mul('2', s0)",
        "Symbol('s0', commutative=True)", "Float('0.5', precision=10000000)", "Float('1e99999999')",
        "Pow(Integer(9), Integer(999999999))", "9 ** 9 ** 9",
        "LShift(Integer(1), Integer(10000000))",
        "Pow(Pow(Pow(Integer(9), Integer(64)), Integer(64)), Integer(64))",
        "Pow(Integer(9), Add(Integer(99999999), Mul(Integer(0), s0)))",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "FloatPow(2.0, ToFloat(Mul(64, 64, s0)))",
        "Pow(Integer(2), Mul(Integer(9), Pow(Integer(9), Integer(9))))",
        "FloatPow(s0, -99999.0)", "s0[0]", "Symbol",
    ],
)  # fmt: skip
def test_anything_else_in_a_size_does_not(text: str) -> None:
    assert not is_plain_expression(text)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("L['args'][0].size()[1] <= 512", True),
        ("L['x'].size()[1] == L['y'].size()[0] and 2 <= L['x'].size()[0]", True),
        ("max(1, L['x'].size()[0]) != 3", True),
        ("math.trunc(0.5*torch.sym_float(L['x'].size()[1])) == 8", True),
        ("math.trunc(torch.sym_float(L['x'].size()[1]) ** 0.5) == 4", True),
        ("(L['x'].size()[1] // 4) == 4 and round(0.3*L['x'].size()[1]) >= 0", True),
        ("torch.sym_max(1, 8*(L['x'].size()[0] // 2)) == 8*(L['x'].size()[0] // 2)", True),
        ("math.ceil(L['x'].size()[0] / 2) <= 4", True),
        ("torch.hub.load('f', 'g') == 1", False),
        ("torch.sym_max.__self__ == 1", False),
        ("L['x'].sym_max(1, 2) == 1", False),
        ("math.factorial(L['x'].size()[1]) == 8", False),
        ("torch.hub.load('a', 'b') == 8", False),
        ("torch.sym_float == math", False),
        ("9 ** 9 ** 9 == L['x'].size()[0]", False),
        ("open('f', 'w') is not None", False),
        ("L['x'].__class__ == 1", False),
        ("L['x'].tofile('f') == 1", False),
        ("__import__('os').system('true') == 0", False),
        ("[x for x in (1,)] == 1", False),
        ("(lambda: 1)() == 1", False),
        ("L['x'].size(", False),
    ],
)
def test_guards(text: str, plain: bool) -> None:
    assert is_plain_guard(text) is plain
