"""Reads the meaning of an attention mask from the index arithmetic that builds it.

A mask is an expression over the indices (batch, head, query, key). Frameworks write the same
few masks in many ways: buffers of positions, arange and compare, advanced indexing, expand.
Evaluating the nodes *at a symbolic index* instead of matching them gives one form for all:
a conjunction of atoms such as `key <= query` and `attention_mask[batch, key] != 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.graph.moves import (
    CASTS,
    COPIES,
    RESHAPES,
    TRANSPOSES,
    order_of,
)
from graphwright.ir.graph.nodes import argument
from graphwright.ir.graph.sizes import expression, sizes_of

aten = torch.ops.aten
B, H, Q, K = (sympy.Symbol(n, integer=True, nonnegative=True) for n in ("b", "h", "q", "k"))

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Load:
    """An element of a tensor node at an index."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class Truth:
    """A load that is not zero."""

    load: Load


@dataclass(frozen=True)
class All:
    """A conjunction. Atoms: sympy relations, `Truth`, or anything not understood (a `Load`)."""

    atoms: frozenset[Any]


class Unclear(Exception):
    """The node's value cannot be told from its index."""


def conjunction(mask: fx.Node, state: Mapping[str, torch.Tensor]) -> frozenset[Any] | None:
    """Atoms of a boolean mask (batch, heads, queries, keys) or fewer axes; None when unclear."""
    variables = (B, H, Q, K)[-mask.meta["val"].dim() :]
    index = tuple(
        sympy.Integer(0) if size == 1 else v
        for v, size in zip(variables, sizes_of(mask), strict=True)
    )
    try:
        value = _truth(_Reader(state).at(mask, index))
    except Unclear:
        return None
    return value.atoms


def _truth(value: Any) -> All:
    if isinstance(value, All):
        return value
    if value is True or value is sympy.true:
        return All(frozenset())
    if isinstance(value, Load):
        return All(frozenset({Truth(value)}))
    if isinstance(value, sympy.core.relational.Relational | sympy.logic.boolalg.BooleanFalse):
        return All(frozenset({value}))
    if isinstance(value, sympy.Expr) and value.is_number:
        return All(frozenset() if value != 0 else frozenset({sympy.false}))
    raise Unclear


class _Reader:
    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state

    def at(self, node: Any, index: Index) -> Any:
        """The element of `node` at a symbolic index."""
        if isinstance(node, bool):
            return node
        if isinstance(node, int):
            return sympy.Integer(node)
        if not isinstance(node, fx.Node):
            raise Unclear
        fake = node.meta.get("val")
        if isinstance(fake, torch.SymInt | int):
            return sympy.sympify(expression(fake))
        if not isinstance(fake, torch.Tensor):
            raise Unclear
        if node.op == "get_attr":
            return self.buffer(node, index)
        rule = _RULES.get(node.target)
        if rule is None:
            return Load(node, index)
        try:
            return rule(self, node, index)
        except Unclear:
            return Load(node, index)

    def operand(self, node: Any, index: Index) -> Any:
        """`at` for an operand that broadcasts to the result's index."""
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
            shape = sizes_of(node)
            tail = index[len(index) - len(shape) :]
            index = tuple(
                sympy.Integer(0) if s == 1 else i for s, i in zip(shape, tail, strict=True)
            )
        return self.at(node, index)

    def buffer(self, node: fx.Node, index: Index) -> Any:
        """A stored tensor: positions, one number, or a triangle; otherwise just a load."""
        tensor = self.state.get(str(node.target))
        if tensor is None or tensor.dtype.is_floating_point or tensor.dim() == 0:
            return Load(node, index)
        if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            first = tensor.flatten()[0].item()
            return first if tensor.dtype == torch.bool else sympy.Integer(int(first))
        last = torch.arange(tensor.shape[-1])
        if tensor.dtype == torch.int64 and bool((tensor == last).all()):
            return index[-1]
        if tensor.dtype == torch.bool and tensor.dim() >= 2:
            rows = torch.arange(tensor.shape[-2])[:, None]
            if bool((tensor == (last <= rows)).all()):
                return sympy.Le(index[-1], index[-2])
        return Load(node, index)


def _integer(value: Any) -> Any:
    if isinstance(value, sympy.Expr):
        return value
    raise Unclear


def _arange(reader: _Reader, node: fx.Node, index: Index) -> Any:
    args = [_integer(reader.at(a, ())) for a in node.args]
    if node.meta["val"].dtype.is_floating_point:
        raise Unclear
    start = args[0] if len(args) > 1 else sympy.Integer(0)
    return start + index[0] * (args[2] if len(args) > 2 else 1)


def _arithmetic(apply: Callable[[Any, Any], Any]) -> Any:
    def rule(reader: _Reader, node: fx.Node, index: Index) -> Any:
        if node.meta["val"].dtype.is_floating_point or node.kwargs.get("alpha", 1) != 1:
            raise Unclear
        a, b = (_integer(reader.operand(x, index)) for x in node.args[:2])
        return apply(a, b)

    return rule


def _compare(relation: Any) -> Any:
    def rule(reader: _Reader, node: fx.Node, index: Index) -> Any:
        a, b = (reader.operand(x, index) for x in node.args[:2])
        if isinstance(a, Load) and relation is sympy.Ne and b == 0:
            return _truth(a)
        return relation(_integer(a), _integer(b))

    return rule


def _and(reader: _Reader, node: fx.Node, index: Index) -> Any:
    a, b = (_truth(reader.operand(x, index)) for x in node.args[:2])
    return All(a.atoms | b.atoms)


def _cast(reader: _Reader, node: fx.Node, index: Index) -> Any:
    value = reader.operand(node.args[0], index)
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return _truth(value)
    if isinstance(value, sympy.Expr) and not dtype.is_floating_point:
        return value
    raise Unclear


def _same(reader: _Reader, node: fx.Node, index: Index) -> Any:
    return reader.operand(node.args[0], index)


def _transposed(reader: _Reader, node: fx.Node, index: Index) -> Any:
    inner: list[Any] = [None] * len(index)
    for place, axis in enumerate(order_of(node)):
        inner[axis] = index[place]
    return reader.at(node.args[0], tuple(inner))


def _reshaped(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """A reshape that only adds or removes axes of size 1."""
    source: Any = node.args[0]
    kept = [i for i, s in zip(index, sizes_of(node), strict=True) if s != 1]
    if [s for s in sizes_of(node) if s != 1] != [s for s in sizes_of(source) if s != 1]:
        raise Unclear
    rest = iter(kept)
    return reader.at(
        source, tuple(sympy.Integer(0) if s == 1 else next(rest) for s in sizes_of(source))
    )


def _sliced(reader: _Reader, node: fx.Node, index: Index) -> Any:
    dim = argument(node, 1, "dim", 0) % len(index)
    start = argument(node, 2, "start") or 0
    offset = sympy.sympify(reader.at(start, ()))
    size = sizes_of(node.args[0])[dim]  # type: ignore[arg-type]
    if not offset.is_nonnegative:
        offset = offset + size
        if not offset.is_nonnegative:
            raise Unclear
    inner = list(index)
    inner[dim] = offset + inner[dim] * argument(node, 4, "step", 1)
    return reader.at(node.args[0], tuple(inner))


def _selected(reader: _Reader, node: fx.Node, index: Index) -> Any:
    dim = node.args[1] % (len(index) + 1)  # type: ignore[operator]
    place = _integer(reader.at(node.args[2], ()))
    if not place.is_nonnegative:
        raise Unclear
    return reader.at(node.args[0], (*index[:dim], place, *index[dim:]))  # type: ignore[index]


def _indexed(reader: _Reader, node: fx.Node, index: Index) -> Any:
    """x[i, j, ...] with integer index tensors for every axis."""
    source: Any = node.args[0]
    picks: Any = node.args[1]
    if len(picks) != source.meta["val"].dim() or any(p is None for p in picks):
        raise Unclear
    return reader.at(source, tuple(_integer(reader.operand(p, index)) for p in picks))


def _constant(value: int) -> Any:
    def rule(reader: _Reader, node: fx.Node, index: Index) -> Any:
        is_bool = node.meta["val"].dtype == torch.bool
        return bool(value) if is_bool else sympy.Integer(value)

    return rule


def _full(reader: _Reader, node: fx.Node, index: Index) -> Any:
    at = 2 if node.target is aten.new_full.default else 1
    value = argument(node, at, "fill_value")
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return sympy.Integer(value)
    raise Unclear


def _rules() -> dict[Any, Any]:
    rules: dict[Any, Any] = dict.fromkeys((*CASTS,), _cast)
    rules |= dict.fromkeys((*COPIES, aten.expand.default, aten.expand_as.default), _same)
    rules |= dict.fromkeys(TRANSPOSES, _transposed) | dict.fromkeys(RESHAPES, _reshaped)
    rules |= {aten.slice.Tensor: _sliced, aten.select.int: _selected, aten.index.Tensor: _indexed}
    rules |= dict.fromkeys(
        (aten.arange.default, aten.arange.start, aten.arange.start_step), _arange
    )
    rules |= dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic(lambda a, b: a + b))
    rules |= dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(lambda a, b: a - b))
    rules |= dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(lambda a, b: a * b))
    for name, relation in (("ge", sympy.Ge), ("gt", sympy.Gt), ("le", sympy.Le), ("lt", sympy.Lt),
                           ("ne", sympy.Ne)):  # fmt: skip
        packet = getattr(aten, name)
        rules |= dict.fromkeys((packet.Tensor, packet.Scalar), _compare(relation))
    both = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
    rules |= dict.fromkeys(both, _and)
    rules |= dict.fromkeys(
        (aten.new_ones.default, aten.ones.default, aten.ones_like.default), _constant(1)
    )
    rules |= dict.fromkeys(
        (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default), _constant(0)
    )
    rules |= dict.fromkeys(
        (aten.full.default, aten.full_like.default, aten.new_full.default), _full
    )
    return rules


_RULES = _rules()
