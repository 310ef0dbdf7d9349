"""Guards that an export archive carries: what held when another torch traced the model.

The archive's graph has lost the code they come from, so nothing can be run to see whether one of
them matters: all are taken at their word, but for those that torch asks of strides. Their text is
read as arithmetic, never executed.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphwright.ir.signature import DimRange
from graphwright.ir.trace.calling import POSITIONAL, FlatModel
from graphwright.ir.trace.dims import Dynamic, example_sizes
from graphwright.ir.trace.guards import Guard, readable
from graphwright.ir.trace.narrowing import coarse_sizes, sizes_near

SizeOf = Callable[[ast.expr, int], int]

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "abs": abs, "round": round, "int": int, "math.trunc": math.trunc,
    "math.ceil": math.ceil, "math.floor": math.floor, "math.sqrt": math.sqrt, "math.pow": math.pow,
    "math.fabs": math.fabs, "torch.sym_float": float, "torch.sym_int": int, "torch.sym_max": max,
    "torch.sym_min": min, "torch.sym_not": operator.not_, "torch.sym_sqrt": math.sqrt,
}  # fmt: skip


def archived_guards(flat: FlatModel, dynamic: Dynamic, own: Sequence[Guard]) -> list[Guard]:
    """Guards of the archive that `flat.model` was read from, on dimensions that are still free.

    Args:
        flat: whose model may have `size_guards`, the texts of an archive.
        dynamic: the free dimensions.
        own: guards of the trace just made, those on strides among them.
    """
    layouts = [guard for guard in own if guard.layout]
    example = example_sizes(flat.inputs, dynamic)
    found = []
    for text in getattr(flat.model, "size_guards", ()):
        guard = _read(text, flat, dynamic)
        if guard is not None and not any(_same(guard, layout, example) for layout in layouts):
            found.append(guard)
    return found


def _read(text: str, flat: FlatModel, dynamic: Dynamic) -> Guard | None:
    """The guard, or None where it is about no free dimension, or about more than sizes."""
    tree = ast.parse(text, mode="eval").body
    names = list(flat.inputs)
    dims: dict[str, None] = {}
    shown = text

    def place(source: ast.expr, axis: int) -> tuple[str, int]:
        return names[_leaf(flat.trees, source)], axis

    try:
        for node in ast.walk(tree):
            asked = _asked(node)
            if asked is not None:
                name, axis = place(*asked)
                dim = dynamic.get(name, {}).get(axis)
                if dim is not None:
                    dims[dim] = None
                    shown = shown.replace(ast.unparse(node), dim)

        def test(sizes: Mapping[str, int]) -> bool:
            def size_of(source: ast.expr, axis: int) -> int:
                name, axis = place(source, axis)
                dim = dynamic.get(name, {}).get(axis)
                return sizes[dim] if dim is not None else flat.inputs[name].shape[axis]

            return bool(_value(tree, size_of))

        test(example_sizes(flat.inputs, dynamic))
    except (LookupError, TypeError, ArithmeticError, ValueError):
        return None
    if not dims:
        return None
    return Guard(tuple(dims), readable(shown), "the export archive", True, test, archived=True)


def _asked(node: ast.AST) -> tuple[ast.expr, int] | None:
    """(`L['x']`, 1) for `L['x'].size()[1]`."""
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "size"
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, int)
    ):
        return node.value.func.value, node.slice.value
    return None


def _leaf(trees: Mapping[str, Any], source: ast.expr) -> int:
    """The tensor that `L['batch']['x']` or `L['args'][0]` names."""
    keys: list[Any] = []
    while isinstance(source, ast.Subscript) and isinstance(source.slice, ast.Constant):
        keys.insert(0, source.slice.value)
        source = source.value
    first, *rest = keys
    tree = trees[POSITIONAL if first == "args" and first not in trees else first]
    for key in rest:
        ((_, parts),) = tree.items()
        tree = parts[key]
    return int(tree["leaf"])


def _value(node: ast.AST, size_of: SizeOf) -> Any:
    """The number or truth value of a checked expression."""
    asked = _asked(node)
    if asked is not None:
        return size_of(*asked)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, size_of), _value(node.right, size_of))
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_value(node.operand, size_of))
    if isinstance(node, ast.BoolOp):
        together = all if isinstance(node.op, ast.And) else any
        return together(_value(part, size_of) for part in node.values)
    if isinstance(node, ast.Compare):
        values = [_value(part, size_of) for part in (node.left, *node.comparators)]
        pairs = zip(node.ops, itertools.pairwise(values), strict=True)
        return all(_COMPARE[type(op)](*pair) for op, pair in pairs)
    if isinstance(node, ast.Call):
        return _CALLS[ast.unparse(node.func)](*(_value(a, size_of) for a in node.args))
    raise LookupError(ast.unparse(node))


def _same(guard: Guard, other: Guard, example: Mapping[str, int]) -> bool:
    """Whether two guards hold at the same sizes, as far as one looks."""
    if set(guard.dims) != set(other.dims):
        return False
    anything = DimRange()
    look = sizes_near if len(guard.dims) == 1 else coarse_sizes
    grids = [look(example[dim], anything) for dim in guard.dims]
    return all(
        guard.holds(sizes) == other.holds(sizes)
        for sizes in (dict(zip(guard.dims, s, strict=True)) for s in itertools.product(*grids))
    )
