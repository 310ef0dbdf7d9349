"""Heads of language models, which stay dense where nobody names them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import fx

from graphwright.ir.layers.kinds import PRODUCTS, TABLE
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program

DENSE_HEAD = "a language model's head stays dense, as in the papers: name it in targets to have it"


def left_heads(program: Program, chosen: Sequence[Layer], targets: Sequence[str]) -> set[fx.Node]:
    """The chosen layers that are heads over a vocabulary and that no target names.

    A head gives as many outputs as an embedding table has rows, and no other layer reads them.
    `*` and a kind name no layer. Embeddings are no products, and none of them is meant.
    """
    every = layers(program)
    tables = {
        int(program.state[layer.weight].shape[0])
        for layer in every
        if layer.kind == "embedding" and layer.weight
    }
    named = [p for p in targets if p != "*" and not p.startswith(("!", "kind:"))]
    products = {layer.node for layer in every if layer.kind in PRODUCTS}
    found = set()
    for layer in chosen if tables else ():
        if not layer.weight or any(fnmatchcase(n, p) for n in layer.names for p in named):
            continue
        rows = int(program.state[layer.weight].shape[TABLE[layer.kind].out_axis])
        if rows in tables and _is_last(layer.node, products):
            found.add(layer.node)
    return found


def _is_last(node: fx.Node, products: set[fx.Node]) -> bool:
    """Whether what a node gives reaches no other product."""
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in products:
            return False
        if user not in seen:
            seen.add(user)
            stack.extend(user.users)
    return True
