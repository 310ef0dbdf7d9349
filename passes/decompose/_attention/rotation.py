"""Rotary position embedding in a graph, in whichever order it pairs channels.

Source: Su et al. 2021, "RoFormer"; pairs (j, j + d / 2) as GPT-NeoX and Llama have them, or
(2 j, 2 j + 1) as GPT-J has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir.layers.kinds import matrix_product
from graphwright.passes.decompose._attention.layout import Sizes, Unlike, places, run, shape_at

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """x cos + turned(x) sin.

    Attributes:
        x: what is rotated, four dimensions with channels last.
        cos, sin: tables, equal for all heads.
        pairs: (d / 2, 2): channels (i, j) with turned(x)_i = -x_j and turned(x)_j = x_i.
        calls: nodes between x and the result, which is one of them.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    pairs: Tensor
    calls: frozenset[fx.Node]


def rotation(node: fx.Node, sizes: Sizes) -> Rotation | None:
    """The rotation that gives a node; None where it is no sum of two products.

    Raises:
        Unlike: it looks like one and is another.
    """
    products = _pair(node, aten.add.Tensor)
    if products is None:
        return None
    factors = [_pair(product, aten.mul.Tensor) for product in products]
    if factors[0] is None or factors[1] is None:
        return None
    for straight, turned in (factors, factors[::-1]):
        assert straight is not None
        assert turned is not None
        for x, cos in (straight, straight[::-1]):
            for half, sin in (turned, turned[::-1]):
                between = _between(x, half)
                if between and not _between(x, cos) and not _between(x, sin):
                    calls = frozenset({node, *products, *between})
                    _check_table(cos, x)
                    _check_table(sin, x)
                    return Rotation(x, cos, sin, _pairs(x, half, sizes), calls)
    return None


def _pair(node: fx.Node, target: object) -> tuple[fx.Node, fx.Node] | None:
    if node.target is not target or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        return first, second
    return None


def _between(x: fx.Node, node: fx.Node) -> set[fx.Node]:
    """The nodes from x (left out) to a node; empty when it does not come from x."""
    found: set[fx.Node] = set()
    known: dict[fx.Node, bool] = {x: True}

    def reach(current: fx.Node) -> bool:
        if current not in known:
            known[current] = False
            if current.op == "call_function" and matrix_product(current) is None:
                known[current] = any([reach(operand) for operand in current.all_input_nodes])
            if known[current]:
                found.add(current)
        return known[current]

    return found if reach(node) and node is not x else set()


def _pairs(x: fx.Node, turned: fx.Node, sizes: Sizes) -> Tensor:
    given = places(shape_at(x, sizes))
    result = run(turned, {x: given}, sizes)
    width = given.shape[-1]
    if not isinstance(result, Tensor) or result.shape != given.shape or given.dim() != 4:
        raise Unlike("its rotation changes the shape")
    first = result.reshape(-1, width)[0]
    source = (first.abs().long() - 1) % width
    expected = given[..., source] * first.sign()
    partners = torch.arange(width)
    if (
        not torch.equal(expected, result)
        or not torch.equal(source[source], partners)
        or bool((source == partners).any())
        or not torch.equal(first.sign()[source], -first.sign())
    ):
        raise Unlike("its rotation does not turn pairs of channels")
    lower = torch.nonzero(first < 0).flatten()
    return torch.stack([lower, source[lower]], 1)


def _check_table(table: fx.Node, x: fx.Node) -> None:
    shape, of = list(table.meta["val"].shape), list(x.meta["val"].shape)
    if len(shape) > 4 or shape[-1:] != of[-1:]:
        raise Unlike(f"its table {table.name} does not fit its channels")
