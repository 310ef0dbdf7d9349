"""The part of a program behind a group of layers, up to where their results meet."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.program import Program
from graphwright.ir.select import KINDS
from graphwright.ir.weights import INPUT_ARGUMENT, PRODUCTS, constant_value

aten = torch.ops.aten

MOVES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints,
                   aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
                   aten.contiguous.default})  # fmt: skip
"""Ops between a result and the layer that reads it, which do not change a value."""

PAIRS = frozenset({aten.matmul.default, aten.bmm.default})
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
SCORED = MOVES | {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar,
                  aten.where.self, aten.to.dtype, aten.sub.Tensor}  # fmt: skip
"""What lies between the product of queries and keys and its softmax."""

LARGEST = 96
"""Nodes of a region; a group whose results meet later is judged by the results themselves."""


Values = Mapping[fx.Node, Any]
Visit = Callable[[int, list[Values], list[list[Tensor]], Values], None]
"""Index of a region, what it reads and what its ends are in every batch, and its constants."""


@dataclass(frozen=True)
class Region:
    """Nodes that are computed anew when the weights of a group change.

    Attributes:
        nodes: in graph order, layers of the group included.
        ends: whose values are compared.
        reads: values that are computed elsewhere.
    """

    nodes: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]

    def run(
        self, values: Values, constants: Values, weights: Mapping[fx.Node, Tensor]
    ) -> list[Tensor]:
        """Values of the ends.

        Args:
            values: of `reads`.
            constants: values of stored or rebuilt operands.
            weights: values for some of the constant operands, to be used instead.
        """
        local: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            for known in (local, weights, values):
                if node in known:
                    return known[node]
            return constants[node]

        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            local[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [local[end] for end in self.ends]


def region_of(
    layers: Sequence[fx.Node], order: Mapping[fx.Node, int], constant: set[fx.Node]
) -> Region:
    """From the layers to the first node that all paths from them lead through, and on to the next
    layer where only moves lie between: the attention of q, k, v; the MLP of a gate and its value.

    Layers that share no such node, or only a far one, are compared by their own results. A layer
    by itself is its own region.

    Args:
        layers: calls that read one activation.
        order: position of every node of the graph.
        constant: nodes that depend on no input.
    """
    own = Region(tuple(layers), tuple(layers), _reads(layers, constant))
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
    return Region(tuple(nodes), (nodes[-1],), _reads(nodes, constant))


def _to_next_layer(end: fx.Node) -> list[fx.Node]:
    """Moves behind a node and the layer that reads them; none where there is no such layer."""
    path, node = [], end
    while len(node.users) == 1:
        (user,) = node.users
        path.append(user)
        kind = KINDS.get(user.target)
        if kind in PRODUCTS:
            reads = user.args[INPUT_ARGUMENT.get(kind, 0)] is node
            is_last = sum(a is node for a in user.all_input_nodes) == 1
            return path if reads and is_last else []
        if user.target not in MOVES:
            return []
        node = user
    return []


def _reads(nodes: Sequence[fx.Node], constant: set[fx.Node]) -> tuple[fx.Node, ...]:
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and operand not in constant:
                found[operand] = None
    return tuple(found)


def constants_of(program: Program, nodes: Sequence[fx.Node], constant: set[fx.Node]) -> dict[
    fx.Node, Any
]:  # fmt: skip
    """Values of all constant operands of some nodes."""
    operands = {o for node in nodes for o in node.all_input_nodes if o in constant}
    return {node: constant_value(program, node) for node in operands}


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on no input and draw no random numbers."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        is_call = node.op == "call_function" and not is_random
        if node.op == "get_attr" or (is_call and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def walk(
    program: Program,
    batches: Sequence[tuple[Tensor, ...]],
    regions: Sequence[Region],
    visit: Visit,
) -> None:
    """Runs all batches through the program, node by node, and visits regions as they end.

    Values are freed after their last use, or after the last region that reads them.

    Args:
        program: left as it is.
        batches: one tensor per input each; all are in memory at once.
        regions: of the program's graph.
        visit: see `Visit`.
    """
    constant = constant_nodes(program.graph)
    last: dict[fx.Node, fx.Node] = {}
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    ending: dict[fx.Node, list[int]] = {}
    for index, region in enumerate(regions):
        ending.setdefault(max(region.ends, key=order.__getitem__), []).append(index)
    for node in program.graph.nodes:
        needed = [*node.all_input_nodes]
        for index in ending.get(node, ()):
            needed += [*regions[index].reads, *regions[index].ends]
        last.update(dict.fromkeys(needed, node))
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        dead.setdefault(user, []).append(node)
    values: dict[fx.Node, list[Any]] = {}
    names = [spec.name for spec in program.signature.inputs]
    left = len(regions)
    for node in program.graph.nodes:
        if node.op == "output" or not left:
            return
        if node.op == "placeholder":
            values[node] = [batch[names.index(str(node.target))] for batch in batches]
        elif node not in constant:
            values[node] = _evaluate(program, node, values, constant, len(batches))
        for index in ending.get(node, ()):
            region = regions[index]
            reads: list[Values] = [
                {n: values[n][b] for n in region.reads} for b in range(len(batches))
            ]
            ends = [[values[n][b] for n in region.ends] for b in range(len(batches))]
            visit(index, reads, ends, constants_of(program, region.nodes, constant))
            left -= 1
        for gone in dead.get(node, ()):
            values.pop(gone, None)


def _evaluate(
    program: Program,
    node: fx.Node,
    values: Mapping[fx.Node, list[Any]],
    constant: set[fx.Node],
    count: int,
) -> list[Any]:
    known = constants_of(program, [node], constant)

    def call(batch: int) -> Any:
        def value(operand: fx.Node) -> Any:
            return known[operand] if operand in known else values[operand][batch]

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return [call(batch) for batch in range(count)]


def feeds_scores(layer: fx.Node) -> bool:
    """Whether a layer's result becomes a query or key: there, weights are better not clipped."""
    stack, seen = [(layer, user) for user in layer.users], set()
    while stack:
        source, node = stack.pop()
        if (source, node) in seen or node.op == "output":
            continue
        seen.add((source, node))
        if node.target is aten.scaled_dot_product_attention.default:
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
