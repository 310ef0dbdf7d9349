"""Rewrites of layers with an adapter beside them that is not merged.

linear(x, w, bias) + linear(low, b)       -> adapted_linear
low-bit product    + linear(low, b)       -> the low-rank term of its epilogue
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.triton.low_bit import ADDED, LINEARS
from graphwright.backends.triton.values import same_kind
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.ops.adapted_linear import adapted_linear
from graphwright.ir.rewrite import Match, Rewrite, op, value
from graphwright.ir.stored.read import is_call

aten = torch.ops.aten


class Adapted(Rewrite):
    """A layer + the product of few values with b: one call. A second adapter joins the first one:
    its values and its b are put beside those that are there."""

    pattern = op(aten.add.Tensor, value("one"), value("other"))

    def condition(self, match: Match, editor: Editor) -> str | None:
        return None if _roles(match) is not None else "no layer and an adapter of fewer weights"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        found = _roles(match)
        assert found is not None
        y, low, b = found
        if y.target is aten.linear.default:
            arguments = [*full_arguments(y)[0], low, b, None, "none"]
            return editor.call(adapted_linear, *arguments, before=match.root, like=y)
        arguments = list(y.args)
        place = ADDED[y.target]  # type: ignore[index]
        there = arguments[place - 2 : place]
        if there[0] is not None:
            low = editor.call(aten.cat.default, [there[0], low], -1, before=match.root)
            b = editor.call(aten.cat.default, [there[1], b], 1, before=match.root)
        arguments[place - 2 : place] = [low, b]
        return editor.call(y.target, *arguments, before=match.root, like=y)


def _roles(match: Match) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The layer's result, the adapter's values and its b, where the sum is of these."""
    one, other = match.node("one"), match.node("other")
    if one is other or not same_kind(one, other, match.root):
        return None
    for y, change in ((one, other), (other, one)):
        if _is_base(y) and _is_change(change):
            x: Any = y.args[0]
            low, b = change.args[:2]
            assert isinstance(low, fx.Node)
            assert isinstance(b, fx.Node)
            (out, rank), columns = b.meta["val"].shape, x.meta["val"].shape[-1]
            if rank * (out + columns) < out * columns:
                return y, low, b
    return None


def _is_base(node: fx.Node) -> bool:
    """Whether nothing else reads a layer's result, and its product is one of ours or has a plain
    stored weight: what another op rebuilds is for the rewrites of that op."""
    if len(node.users) != 1:
        return False
    if node.target is aten.linear.default:
        weight = node.args[1]
        return isinstance(weight, fx.Node) and weight.op == "get_attr"
    return is_call(node, *LINEARS) and node.args[-1] == "none"


def _is_change(node: fx.Node) -> bool:
    """Whether a node is low @ b.T with a b that does not depend on the input."""
    if not is_call(node, aten.linear.default) or len(node.users) != 1:
        return False
    _, b, bias = full_arguments(node)[0]
    return bias is None and isinstance(b, fx.Node) and not depends_on_input(b)
