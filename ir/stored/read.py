"""Reads from a graph the form of a compressed weight, and the product that uses it.

A weight may be codes in blocks, codes of a table, or codebooks, which a method adds up, lays side
by side, permutes and scales; on top may lie low-rank corrections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import MATRICES, operators
from graphwright.ir.ops.blocks import dequantize_blocks
from graphwright.ir.ops.codebook import dequantize_codebook
from graphwright.ir.ops.low_rank import add_low_rank
from graphwright.ir.ops.table import dequantize_table

aten = torch.ops.aten

PRODUCTS = tuple(operators(MATRICES))
"""Calls that may be a product with a weight."""


@dataclass
class Form:
    """The stored form of a weight (out, columns).

    Attributes:
        parts: stretches of columns, each (first column, end, the calls that rebuild it: they are
            added).
        order: node of the place of every column in the stretches, or None.
        scale, shift: nodes of the factors and summands of the columns, or None.
        low_rank: nodes (b, a) of the corrections.
    """

    parts: list[tuple[int, int, list[fx.Node]]] = field(default_factory=list)
    order: fx.Node | None = None
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    low_rank: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node is a call of one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _turned(node: Any) -> Any:
    """The operand of a call that exchanges its two dimensions; None for any other node."""
    if not is_call(node, aten.transpose.int) or node.args[0].meta["val"].dim() != 2:
        return None
    return node.args[0] if sorted(axis % 2 for axis in node.args[1:]) == [0, 1] else None


def plain(node: Any) -> Any:
    """The node before casts between floating-point types, and before turns and their inverse."""
    while True:
        if is_call(node, aten.to.dtype) and node.args[0].meta["val"].is_floating_point():
            node = node.args[0]
        elif _turned(_turned(node)) is not None:
            node = _turned(_turned(node))
        else:
            return node


def form_of(weight: Any) -> Form | None:
    """The stored form of a weight; None when it is not compressed in one of our three ways."""
    form = Form()
    node = plain(weight)
    while is_call(node, add_low_rank):
        form.low_rank.append((node.args[1], node.args[2]))
        node = plain(node.args[0])
    if is_call(node, dequantize_blocks, dequantize_table):
        columns = int(node.meta["val"].shape[-1])
        form.parts.append((0, columns, [node]))
        return form if node.meta["val"].dim() == 2 else None
    return _codebook_form(node, form)


def _codebook_form(node: Any, form: Form) -> Form | None:
    columns = int(node.meta["val"].shape[-1]) if isinstance(node, fx.Node) else 0
    if is_call(node, aten.add.Tensor) and is_call(node.args[0], aten.mul.Tensor):
        scaled, form.shift = node.args
        node, form.scale = scaled.args
        if not all(_is_row(vector, columns) for vector in (form.scale, form.shift)):
            return None
    if is_call(node, aten.index_select.default) and node.args[1] == 1:
        node, _, form.order = node.args
    stretches = [node]
    if is_call(node, aten.cat.default) and node.args[1:] == (1,):
        stretches = list(node.args[0])
    end = 0
    for stretch in stretches:
        terms = list(_terms(stretch))
        if not all(is_call(term, dequantize_codebook) for term in terms):
            return None
        start, end = end, end + int(stretch.meta["val"].shape[1])
        form.parts.append((start, end, terms))
    return form if end == columns else None


def _is_row(vector: Any, columns: int) -> bool:
    return isinstance(vector, fx.Node) and tuple(vector.meta["val"].shape) == (columns,)


def _terms(node: Any) -> Iterator[Any]:
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        yield from (*_terms(node.args[0]), *_terms(node.args[1]))
    else:
        yield node


def product_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(input, weight (out, columns), bias) of a product with a weight; None for any other."""
    args, kwargs = full_arguments(node)
    if node.target is aten.linear.default:
        return args[0], args[1], args[2]
    if node.target is aten.addmm.default:
        bias, x, turned = args[:3]
        if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
            return None
        if bias.meta["val"].dim() != 1 or bias.meta["val"].shape[0] != node.meta["val"].shape[1]:
            return None
    else:
        bias, x, turned = None, *args[:2]
    weight = _turned(turned)
    return None if weight is None else (x, weight, bias)


def stacked_rows(weight: Any) -> fx.Node | None:
    """The matrix (experts * out, in) that a stack of experts is made of; None where it is not."""
    if is_call(weight, aten.transpose.int) and sorted(a % 3 for a in weight.args[1:]) == [1, 2]:
        weight = weight.args[0]
    if not is_call(weight, aten.reshape.default) or weight.meta["val"].dim() != 3:
        return None
    rows: fx.Node = weight.args[0]
    return rows if rows.meta["val"].dim() == 2 else None


def int8_rows(weight: fx.Node) -> tuple[str, str] | None:
    """Names of the stored int8 codes of a matrix and of their scales, one per row; or None."""
    if not is_call(weight, torch.ops.graphwright.dequantize.default):
        return None
    codes, scale, zero_point, axis = weight.args
    if zero_point is not None or any(part.op != "get_attr" for part in (codes, scale)):  # type: ignore[union-attr]
        return None
    value = codes.meta["val"]  # type: ignore[union-attr]
    fits = value.dtype == torch.int8 and value.dim() == 2 and scale.meta["val"].dim() == 1  # type: ignore[union-attr]
    return (str(codes.target), str(scale.target)) if fits and axis % 2 == 0 else None  # type: ignore[operator, union-attr]


CODED = "graphwright::dequantize"
"""The start of the names of our ops that rebuild a weight from codes."""


def is_coded(weight: fx.Node) -> bool:
    """Whether a weight is rebuilt from codes."""
    stack, seen = [weight], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if rebuilds(node):
            return True
        stack.extend(node.all_input_nodes)
    return False


def rebuilds(node: fx.Node) -> bool:
    """Whether a node is one of our ops that make a weight of codes."""
    name = getattr(node.target, "name", None)
    return callable(name) and name().startswith(CODED)
