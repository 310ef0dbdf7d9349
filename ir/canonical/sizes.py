"""Whole quotients of sizes as such: `int(t / 4)` and `math.ceil(t / 4)` without floats.

Integer arithmetic is exact at every size, and shapes with it are simpler: `int(4 * t / 4)` is `t`.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor

ROUNDINGS = (math.trunc, math.floor, math.ceil)


def divide_whole(editor: Editor) -> None:
    """Rewrites roundings of a size divided by a whole number, in the editor's graph."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node.target not in ROUNDINGS:
            continue
        found = _quotient(node.args[0])
        if found is None:
            continue
        size, divisor = found
        if node.target is math.trunc and not _never_negative(size):
            continue
        if node.target is math.ceil:
            below = editor.call(operator.neg, size, before=node)
            whole = editor.call(operator.floordiv, below, divisor, before=node)
            node.target = operator.neg
            editor.set_args(node, whole)
        else:
            node.target = operator.floordiv
            editor.set_args(node, size, divisor)
        node.meta["val"] = editor.evaluate(node)


def _quotient(node: Any) -> tuple[fx.Node, int] | None:
    """(size, whole divisor) of `size / 4`, `size / 4.0` and `size * 0.25`."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.args) != 2:
        return None
    size, number = node.args
    if node.target is operator.mul and not isinstance(size, fx.Node):
        size, number = number, size
    if not isinstance(number, int | float) or isinstance(number, bool) or number <= 0:
        return None
    if node.target is operator.mul:
        divisor = 1 / number
        if math.frexp(divisor)[0] != 0.5:  # else the product is not the quotient
            return None
    elif node.target is operator.truediv:
        divisor = float(number)
    else:
        return None
    whole = _whole(size)
    return (whole, int(divisor)) if whole is not None and divisor == int(divisor) else None


def _whole(node: Any) -> fx.Node | None:
    """The integer size behind `sym_float`."""
    if isinstance(node, fx.Node) and node.target is torch.sym_float:
        node = node.args[0]
    is_size = isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.SymInt)
    return node if is_size else None


def _never_negative(node: fx.Node) -> bool:
    value = node.meta["val"].node
    return bool(value.shape_env.bound_sympy(value.expr).lower >= 0)
