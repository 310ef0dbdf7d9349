"""Python functions of sizes in a saved program: `math.ceil`, `math.floor`, `round`, `abs`.

Torch's file format knows none of them. They are written as arithmetic that it knows and that gives
the same number, and the file's record says which nodes they were, so that ours come back whole.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "round": builtins.round,
    "abs": operator.abs,
}


class _Writer:
    """Puts arithmetic on sizes in front of a node."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node
        self.made: list[fx.Node] = []

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args)
        made._rename(f"{self.node.name}_{len(self.made)}_")
        values = (a.meta["val"] if isinstance(a, fx.Node) else a for a in args)
        made.meta = {"val": target(*values)}
        self.made.append(made)
        return made

    def floor(self, x: fx.Node) -> fx.Node:
        return self.call(math.trunc, self.call(operator.sub, x, self.fraction(x)))

    def ceil(self, x: fx.Node) -> fx.Node:
        below = self.fraction(self.call(operator.neg, x))
        return self.call(math.trunc, self.call(operator.add, x, below))

    def round(self, x: fx.Node, digits: int | None = None) -> fx.Node:
        """To the nearest, halves to the even one."""
        scaled = self.call(operator.mul, x, 10.0**digits) if digits else x
        above = self.call(operator.add, scaled, 0.5)
        nearest = self.floor(above)
        no_half = self.ceil(self.fraction(above))
        half = self.call(operator.sub, 1, no_half)
        odd = self.call(operator.mod, nearest, 2)
        even = self.call(operator.sub, nearest, self.call(operator.mul, odd, half))
        if digits is None:
            return even
        return self.call(operator.truediv, self.call(torch.sym_float, even), 10.0**digits)

    def abs(self, x: fx.Node) -> fx.Node:
        return self.call(torch.sym_max, x, self.call(operator.neg, x))

    def fraction(self, x: fx.Node) -> fx.Node:
        """The distance of `x` from the next whole number below it."""
        return self.call(operator.mod, x, 1.0)


def spell(graph: fx.Graph) -> dict[str, dict[str, Any]]:
    """Rewrites such calls in place; returns what `restore` needs, by name of the node."""
    names = {function: name for name, function in FUNCTIONS.items()}
    record: dict[str, dict[str, Any]] = {}
    for node in list(graph.nodes):
        name = names.get(node.target) if node.op == "call_function" else None
        if name is None or not isinstance(node.args[0], fx.Node):
            continue
        writer = _Writer(graph, node)
        source, *rest = node.args
        spelled = getattr(writer, name)(source, *rest)
        *helpers, last = writer.made
        assert last is spelled
        graph.erase_node(_take_over(node, spelled))
        record[node.name] = {
            "call": name, "of": source.name, "rest": rest, "made": [n.name for n in helpers]
        }  # fmt: skip
    return record


def _take_over(node: fx.Node, last: fx.Node) -> fx.Node:
    """Gives `node` the call of `last`, which is left without users."""
    node.target, node.args, node.kwargs = last.target, last.args, {}
    return last


def restore(graph: fx.Graph, record: dict[str, dict[str, Any]]) -> None:
    """Takes back what `spell` did.

    Raises:
        KeyError, ValueError: the record does not fit the graph.
    """
    nodes = {node.name: node for node in graph.nodes}
    for name, entry in record.items():
        node, digits = nodes[name], entry["rest"]
        if not all(d is None or isinstance(d, int) for d in digits):
            raise ValueError(f"digits {digits!r}")
        node.target, node.args = FUNCTIONS[entry["call"]], (nodes[entry["of"]], *digits)
        for helper in reversed(list(_nodes(nodes, entry["made"]))):
            graph.erase_node(helper)


def _nodes(nodes: dict[str, fx.Node], names: list[str]) -> Iterator[fx.Node]:
    return (nodes[name] for name in names)
