"""The part of a program behind a group of layers, up to where their results meet."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  a region that was unpickled may call our ops
from graphwright.ir.graph.constants import constant_operand
from graphwright.ir.layers.heads import FUSED
from graphwright.ir.layers.kinds import INPUT_ARGUMENT, KINDS, PRODUCTS
from graphwright.ir.program import Program

aten = torch.ops.aten

MOVES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints,
                   aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
                   aten.contiguous.default})  # fmt: skip
"""Ops between a result and the layer that reads it, which do not change a value."""

PAIRS = frozenset({aten.matmul.default, aten.bmm.default})
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
SCORED = MOVES | {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar,
                  aten.where.self, aten.to.dtype, aten.sub.Tensor}  # fmt: skip
"""Calls between the product of queries and keys and its softmax."""

LARGEST = 96
"""Nodes of a region; a group whose results meet later is judged by the results themselves."""


@dataclass(frozen=True)
class Region:
    """Nodes that are computed anew when the weights of a group change.

    Attributes:
        nodes: in graph order, layers of the group included, and what they are combined with as
            far as that is computed behind the first of them.
        ends: whose values are compared.
        reads: values that are computed before the first layer.
    """

    nodes: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]

    def module(
        self, program: Program, weights: Sequence[fx.Node], device: torch.device
    ) -> fx.GraphModule:
        """Computes the ends from the reads and `weights`; holds all other constants.

        It refers to nothing of the program, and can be pickled: so it travels to a worker.
        """
        graph, stored = fx.Graph(), dict[str, Any]()
        twin: dict[fx.Node, Any] = {n: graph.placeholder(n.name) for n in (*self.reads, *weights)}

        def operand(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return device if isinstance(leaf, torch.device) else leaf
            if leaf not in twin:
                twin[leaf] = value = constant_operand(program, leaf, device)
                if isinstance(value, Tensor):
                    stored[leaf.name], twin[leaf] = value, graph.get_attr(leaf.name)
            return twin[leaf]

        for node in self.nodes:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), operand)
            twin[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        graph.output(tuple(twin[end] for end in self.ends))
        return fx.GraphModule(stored, graph)


def region_of(
    layers: Sequence[fx.Node], order: Mapping[fx.Node, int], constant: set[fx.Node]
) -> Region:
    """From the layers to the first node that all paths from them lead through, and on to the next
    layer where only moves lie between: the attention of q, k, v; the MLP of a gate and its value.

    Layers that share no such node, or only a far one, are compared by their own results. A layer
    by itself is its own region.

    Args:
        layers: calls that read one activation, in graph order.
        order: position of every node of the graph.
        constant: nodes that depend on no input.
    """
    own = _ending(layers, order[layers[0]], order, constant)
    if len(layers) == 1:
        return own
    heap = [(order[node], node) for node in layers]
    heapq.heapify(heap)
    active: set[fx.Node] = set(layers)
    nodes: list[fx.Node] = []
    while heap:
        _, node = heapq.heappop(heap)
        if node.op == "output" or len(nodes) == LARGEST:
            return own
        nodes.append(node)
        active.remove(node)
        if not active:
            break
        for user in node.users:
            if user not in active:
                active.add(user)
                heapq.heappush(heap, (order[user], user))
    nodes += _to_next_layer(nodes[-1])
    whole = _ending(nodes[-1:], order[layers[0]], order, constant)
    return whole if len(whole.nodes) <= LARGEST else own


def _ending(
    ends: Sequence[fx.Node], start: int, order: Mapping[fx.Node, int], constant: set[fx.Node]
) -> Region:
    """All that these ends are computed from, back to position `start`."""
    nodes, reads, stack = set[fx.Node](), set[fx.Node](), list(ends)
    while stack:
        node = stack.pop()
        if order[node] < start:
            reads.add(node)
        elif node not in nodes:
            nodes.add(node)
            stack += [each for each in node.all_input_nodes if each not in constant]
    key = order.__getitem__
    return Region(tuple(sorted(nodes, key=key)), tuple(ends), tuple(sorted(reads, key=key)))


def _to_next_layer(end: fx.Node) -> list[fx.Node]:
    """Moves behind a node and the layer that reads them; none where there is no such layer."""
    path, node = [], end
    while len(node.users) == 1:
        (user,) = node.users
        path.append(user)
        kind = KINDS.get(user.target)
        if kind in PRODUCTS:
            reads = user.args[INPUT_ARGUMENT[kind]] is node
            is_last = sum(a is node for a in user.all_input_nodes) == 1
            return path if reads and is_last else []
        if user.target not in MOVES:
            return []
        node = user
    return []


def feeds_scores(layer: fx.Node) -> bool:
    """Whether a layer's result becomes a query or key: there, weights are better not clipped."""
    stack, seen = [(layer, user) for user in layer.users], set()
    while stack:
        source, node = stack.pop()
        if (source, node) in seen or node.op == "output":
            continue
        seen.add((source, node))
        if node.target in FUSED:
            if source in node.args[:2]:
                return True
        elif node.target in PAIRS:
            if _reaches_softmax(node):
                return True
        elif KINDS.get(node.target) not in (*PRODUCTS, "layer_norm", "rms_norm"):
            stack += [(node, user) for user in node.users]
    return False


def _reaches_softmax(scores: fx.Node) -> bool:
    """Whether a product of two activations is scores: only scaled and masked before a softmax."""
    stack, seen = list(scores.users), set()
    while stack:
        node = stack.pop()
        if node.target in SOFTMAX:
            return True
        if node not in seen and node.target in SCORED:
            seen.add(node)
            stack += list(node.users)
    return False
