"""The order in which a program runs: a weight in codes is rebuilt where it is first read.

Passes put the nodes that rebuild weights at the head of a graph. Run in that order, a program of
compressed weights would hold all of them as floats before the first layer uses one.
"""

from __future__ import annotations

from torch import fx

from graphwright.ir.graph.constants import constant_nodes
from graphwright.ir.graph.nodes import copy_graph


def in_turn(graph: fx.Graph) -> list[fx.Node]:
    """The nodes, with calls that follow from stored tensors right before their first reader.

    All other nodes keep their order; calls that draw random numbers or are written in place are
    among those. A call that follows from stored tensors and that nothing reads is left out.
    """
    stored = _rebuilds(graph)
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in stored and operand not in placed:
                place(operand)
        placed.add(node)
        order.append(node)

    for node in graph.nodes:
        if node not in stored:
            place(node)
    return order


def laid_out(graph: fx.Graph) -> fx.Graph:
    """A copy with the nodes in turn; the graph itself where they are in turn already."""
    order = in_turn(graph)
    if order == list(graph.nodes):
        return graph
    copy = copy_graph(graph)
    by_name = {node.name: node for node in copy.nodes}
    kept = {node.name for node in order}
    for unread in reversed([node for node in copy.nodes if node.name not in kept]):
        copy.erase_node(unread)
    *others, output = order
    for node in others:
        by_name[output.name].prepend(by_name[node.name])
    return copy


def _rebuilds(graph: fx.Graph) -> set[fx.Node]:
    """Calls that read stored tensors, or what follows from them, and nothing else."""
    found: set[fx.Node] = set()
    steady = constant_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node not in steady or not node.all_input_nodes:
            continue
        if all(read.op == "get_attr" or read in found for read in node.all_input_nodes):
            found.add(node)
    return found
