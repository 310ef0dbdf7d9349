"""When the activations of a walk are no longer needed."""

from __future__ import annotations

from torch import fx


def last_uses(graph: fx.Graph, constant: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that nothing behind it reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in constant:
                last[operand] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        found.setdefault(user, []).append(value)
    return found
