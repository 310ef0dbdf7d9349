"""A part of a program by itself: the value of one marked node out of that of another."""

from __future__ import annotations

from torch import Tensor, fx

from graphwright.ir.check.precision import Walk
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta
from graphwright.ir.program import Program

MARK = "part"


def mark_part(node: fx.Node, name: str) -> None:
    """Names a node as an end of a part."""
    set_gw_meta(node, **{MARK: name})


def value_of_part(program: Program, begin: str, given: Tensor, end: str) -> Tensor:
    """The value of the node marked `end` where that of `begin` is `given`, in its dtype.

    Only calls between the two are run; they read stored tensors besides, and no input.
    """
    named = {gw_meta(node).get(MARK): node for node in program.graph.nodes}
    first, last = named[begin], named[end]
    walk = Walk(program, program.examples, wide=given.element_size() == 8)
    walk.values[first] = given
    needed: set[fx.Node] = set()
    open_ends = [last]
    while open_ends:
        node = open_ends.pop()
        if node not in needed and node is not first:
            needed.add(node)
            open_ends += node.all_input_nodes
    for node in program.graph.nodes:
        if node in needed:
            walk.step(node)
    found: Tensor = walk.value(last)
    return found
