"""The grammar of sizes and guards in an export archive: arithmetic, and nothing that runs code.

Torch evaluates size expressions as Python, so every call, name, number and nesting is checked on
the syntax tree first. Powers are bounded, or a short text could ask for numbers without end.
"""

from __future__ import annotations

import ast
import math
import re

CALLS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Mul", "Add", "Pow", "Mod", "PythonMod",
        "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "Max", "Min", "Eq", "Ne", "Lt", "Le",
        "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
        "GreaterThan", "And", "Or", "Not", "Where", "Piecewise", "ExprCondPair", "CeilToInt",
        "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat",
        "FloatTrueDiv", "IntTrueDiv", "FloatPow", "PowByNatural", "LShift", "RShift", "Identity",
        "Abs", "floor", "ceiling", "OpaqueUnaryFn_sqrt", "BitwiseFn_bitwise_and",
        "BitwiseFn_bitwise_or", "BitwiseFn_bitwise_xor", "IsNonOverlappingAndDenseIndicator",
        "Half", "One", "Zero", "NegativeOne", "Infinity", "NegativeInfinity", "BooleanTrue",
        "BooleanFalse",
    }
)  # fmt: skip
"""Functions of sympy and of torch's size arithmetic; none has an effect but its result."""

CONSTANTS = frozenset({"oo", "int_oo", "zoo", "nan", "true", "false"})
KEYWORDS = frozenset({"positive", "integer", "nonnegative", "real", "precision", "evaluate"})
POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
LARGEST_POWER = 64
LARGEST_SIZE = 4096
"""Of any size in a file where some size is an exponent."""

LARGEST_DEGREE = 1024
"""Product of nested constant powers."""

_SYMBOL = re.compile(r"(zuf|zf|s|u)\d{1,9}")
_NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,3})?")
_NUMBER_LIMIT = 2**127
_TEXT_LIMIT = 10_000
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop, ast.Load,
)  # fmt: skip
_UNDEFINED = re.compile(r"Function\('(\w+)'\)")

_GUARD_CALLS = frozenset({"size", "stride", "storage_offset", "dim", "numel", "ndimension"})
_GUARD_FUNCTIONS = frozenset({"max", "min", "abs", "len", "round", "int"})
_GUARD_MODULES = {
    "math": frozenset({"trunc", "ceil", "floor", "sqrt", "pow", "fabs"}),
    "torch": frozenset({"sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_sqrt"}),
}
_GUARD_NODES = (*_ARITHMETIC, ast.Constant, ast.Subscript)


def is_plain_expression(text: str) -> bool:
    """Whether a size expression is arithmetic on numbers and size symbols, of bounded powers."""
    tree = _parsed(defined(text))
    if tree is None:
        return False
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    quoted = {id(a) for n in ast.walk(tree) if isinstance(n, ast.Call) for a in _quoted(n)}
    return (
        all(_is_plain(node, calls, quoted) for node in ast.walk(tree))
        and _degree(tree.body) <= LARGEST_DEGREE
    )


def defined(text: str) -> str:
    """The expression with torch's functions where a save without them left `Function('Mod')`."""
    return _UNDEFINED.sub(lambda m: m[1] if m[1] in CALLS else m[0], text)


def _parsed(text: str) -> ast.Expression | None:
    if len(text) >= _TEXT_LIMIT or "\n" in text or '"' in text:
        return None
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _quoted(call: ast.Call) -> list[ast.Constant]:
    """The string that names a symbol or spells a float."""
    if not isinstance(call.func, ast.Name) or not call.args:
        return []
    grammar = {"Symbol": _NAME, "Float": _NUMBER}.get(call.func.id)
    first = call.args[0]
    if grammar is None or not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return []
    return [first] if grammar.fullmatch(first.value) else []


def _is_plain(node: ast.AST, calls: set[int], quoted: set[int]) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Name):
        known = CALLS if id(node) in calls else CONSTANTS
        return node.id in known or (id(node) not in calls and bool(_SYMBOL.fullmatch(node.id)))
    if isinstance(node, ast.keyword):
        return node.arg in KEYWORDS and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, str):
            return id(node) in quoted
        return isinstance(value, bool | int | float) and abs(value) < _NUMBER_LIMIT
    return isinstance(node, _ARITHMETIC)


def _degree(node: ast.AST) -> int:
    """Product of the constant exponents on the deepest path; too large a number for odd ones."""
    below = max((_degree(child) for child in ast.iter_child_nodes(node)), default=1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Float":
        digits = [k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)]
        return below if all(isinstance(d, int) and d <= 256 for d in digits) else 2**31
    exponent = _power(node)
    return below if exponent is None else below * _exponent(exponent)


def _power(node: ast.AST) -> ast.AST | None:
    """The exponent, where the node is a power; a power without one is its own, which is refused."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in POWERS:
        return node.args[1] if len(node.args) >= 2 else node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return node.right
    return None


def _exponent(node: ast.AST) -> int:
    """The size of an exponent. One with a symbol, whose value `LARGEST_SIZE` bounds, counts as the
    largest there is, so that there is no power of such a power.
    """
    factor = _factor(node)
    return max(factor, LARGEST_POWER) if _has_size(node) else factor


def _factor(node: ast.AST) -> int:
    """A symbol counts as 1, and a number times a symbol as the number; anything else that is
    computed is too large."""
    if _is_size(node):
        return 1
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "ToFloat" and len(node.args) == 1:
            return _factor(node.args[0])
        if node.func.id == "Mul":
            return _small(math.prod(_factor(arg) for arg in node.args))
    value = _literal(node)
    return _small(math.inf if value is None else abs(value))


def _small(value: float) -> int:
    return 2**31 if value > LARGEST_POWER else max(1, math.ceil(value))


def _is_size(node: ast.AST) -> bool:
    """A symbol, or the size of an input in a guard, and no sum with one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "Symbol"
    if isinstance(node, ast.Name):
        return _SYMBOL.fullmatch(node.id) is not None
    return isinstance(node, ast.Subscript)


def _has_size(node: ast.AST) -> bool:
    return any(_is_size(part) for part in ast.walk(node))


def has_size_for_power(text: str) -> bool:
    """Whether a size is an exponent in an expression, so that its value has to be bounded."""
    if not any(sign in text for sign in (*POWERS, "**", "<<")):
        return False
    tree = _parsed(defined(text))
    return tree is not None and any(
        _has_size(exponent) for exponent in map(_power, ast.walk(tree)) if exponent is not None
    )


def _literal(node: ast.AST) -> float | None:
    """The number that is written there; None for anything that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        if node.func.id in ("Integer", "Float"):
            return _literal(node.args[0])
        if node.func.id == "Rational" and len(node.args) == 2:
            over, under = map(_literal, node.args)
            return over / under if over is not None and under else None
    return None


def is_plain_guard(text: str) -> bool:
    """Whether a guard is a comparison of input sizes and constants."""
    tree = _parsed(text)
    if tree is None:
        return False
    callees = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    modules = {
        id(n.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and _is_module_function(n)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            plain = not node.keywords
        elif isinstance(node, ast.Attribute):
            plain = id(node) in callees and (node.attr in _GUARD_CALLS or _is_module_function(node))
        elif isinstance(node, ast.Name):
            plain = _is_plain_name(node, callees, modules)
        else:
            plain = isinstance(node, _GUARD_NODES)
        if not plain:
            return False
    return _degree(tree.body) <= LARGEST_DEGREE


def _is_module_function(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in _GUARD_MODULES.get(node.value.id, ())
    )


def _is_plain_name(node: ast.Name, callees: set[int], modules: set[int]) -> bool:
    if id(node) in callees:
        return node.id in _GUARD_FUNCTIONS
    return id(node) in modules or (not node.id.startswith("__") and node.id not in _GUARD_MODULES)
