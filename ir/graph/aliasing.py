"""Values that a graph writes to in place; passes leave them and their readers alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphwright.ir.graph.nodes import VIEWS, op_name


def written_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Operands that a call writes to (`fill_`, `index_put_`, ...)."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return
    for argument, value in zip(target._schema.arguments, node.args, strict=False):
        alias = argument.alias_info
        if alias is not None and alias.is_write and isinstance(value, fx.Node):
            yield value


def unstable_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value depends on when it is read: written to, aliases of that, and readers.

    Merging, folding or dropping one of them is not safe. Empty for a functional graph.
    """
    aliases: set[fx.Node] = set()
    stack = [base for node in graph.nodes for base in written_operands(node)]
    while stack:
        node = stack.pop()
        if node in aliases:
            continue
        aliases.add(node)
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and (op_name(node) in VIEWS or _writes(node)):
            stack.append(first)
        stack.extend(user for user in node.users if op_name(user) in VIEWS or _writes(user))
    readers = {user for node in aliases for user in node.users if user.op == "call_function"}
    return aliases | readers


def _writes(node: fx.Node) -> bool:
    return any(True for _ in written_operands(node))


def writes(node: fx.Node) -> list[int]:
    """Positions of the arguments that a call writes to."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return []
    return [
        i
        for i, a in enumerate(target._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
