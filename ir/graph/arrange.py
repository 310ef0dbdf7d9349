"""One order of nodes for a program, whatever edits it went through.

Passes and backends walk a graph in the order of its nodes and of their users, and give new nodes
names that are still free. Both would depend on how a program came about: edited in this process,
or read from a file by a resumed run. In the arranged form they depend on the program alone.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphwright.ir.graph.recorded import Recorder

if TYPE_CHECKING:
    from graphwright.ir.program import Program

KEPT = ("val", "nn_module_stack", "custom")
"""Node metadata that a program has; the rest is of its making, and is not saved."""


def arranged(program: Program) -> Program:
    """The same program on a graph of its own, in the one form that also comes out of a file.

    Stored tensors come first, in state order and each read by one node; then inputs; then calls
    in their order, each result of a call with several of them taken once, right behind it.
    Results that nothing uses are not taken. No name that a former node had is remembered, and
    nothing that was once known of free sizes (`recorded.py`).
    """
    state = {name: _dense(tensor) for name, tensor in program.state.items()}
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    recorded = Recorder(program)
    parts = _parts(program.graph)

    def copy(first: fx.Node, *same: fx.Node) -> None:
        new = graph.node_copy(first, lambda node: made[node])
        new.name = first.name
        new.meta = {key: first.meta[key] for key in KEPT if key in first.meta}
        if first.op == "get_attr":
            new.meta["val"] = recorded.stored(state[str(first.target)])
        elif first.op != "output":
            new.meta["val"] = recorded(first.meta["val"])
        made.update(dict.fromkeys((first, *same), new))
        taken = [found for node in (first, *same) for found in parts.get(node, {}).items()]
        by_place: dict[int, list[fx.Node]] = {}
        for place, nodes in taken:
            by_place.setdefault(place, []).extend(nodes)
        for place in sorted(by_place):
            copy(*by_place[place])

    for readers in _readers(program):
        copy(*readers)
    for node in program.graph.find_nodes(op="placeholder"):
        copy(node)
    for node in program.graph.nodes:
        if node.op in ("call_function", "output") and _place(node) is None:
            copy(node)
    return program.replace(graph=graph, state=state)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its values lie one behind the other in some order, as in a file."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.stride() == torch.empty_like(tensor, device="meta").stride():
        return tensor
    copy = tensor.detach().contiguous()
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy


def _readers(program: Program) -> list[list[fx.Node]]:
    """Nodes that read a stored tensor, by tensor in state order; unused ones are left out."""
    found: dict[str, list[fx.Node]] = {name: [] for name in program.state}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.users:
            found.setdefault(str(node.target), []).append(node)
    return [nodes for nodes in found.values() if nodes]


def _parts(graph: fx.Graph) -> dict[fx.Node, dict[int, list[fx.Node]]]:
    """By call, and by place in its results: the nodes that take it; unused ones are left out."""
    found: dict[fx.Node, dict[int, list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        place = _place(node)
        if place is not None and node.users:
            found.setdefault(node.all_input_nodes[0], {}).setdefault(place, []).append(node)
    return found


def _place(node: fx.Node) -> int | None:
    """The place that a getitem node takes from a call's results; None for other nodes."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    return node.args[1]
