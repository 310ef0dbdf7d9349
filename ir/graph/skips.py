"""Skips of a graph: tensors that go past layers and meet their result again, by sum or join.

A skip is an operand of a sum or of a concatenation of channels that comes from a node (the fork)
from which another operand comes too, by way of layers (the body) that the skip goes past. Into a
sum it may come through one 1x1 convolution or linear layer (a projection).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import sympy
from torch import Tensor, fx

from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.graph.nodes import adapter_of, op_name
from graphwright.ir.graph.sizes import Size, shape_of
from graphwright.ir.layers.kinds import CODABLE, KINDS, TABLE
from graphwright.ir.program import Program

PASSING = frozenset({
    "batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm", "mul", "div", "sub",
    "neg", "dropout", "feature_dropout", "relu", "leaky_relu", "silu", "gelu", "elu", "sigmoid",
    "tanh", "hardtanh", "relu6", "prelu", "slice", "pad", "constant_pad_nd", "contiguous", "clone",
    "to", "permute", "transpose", "reshape", "view", "flatten", "unflatten", "alias",
})  # fmt: skip
"""Calls that a skip may go through; none of them mixes places or channels by weights."""

POOLS = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool3d"})
"""Calls that a projection may go through besides: strided skips of residual nets."""


@dataclass(frozen=True)
class Skip:
    """One skip.

    Attributes:
        join: the sum or the concatenation.
        operand: place of the skip among the join's operands.
        fork: the node that skip and body both come from.
        projection: layers on the skip's own way; none or one.
        body: layers that it goes past, in graph order.
        is_long: whether it is a skip of a U-Net: it crosses a coarser level and comes back to its
            own; or it is a concatenation that encloses another one or is enclosed, each tensor
            going to one place.
    """

    join: fx.Node
    operand: int
    fork: fx.Node
    projection: tuple[fx.Node, ...]
    body: tuple[fx.Node, ...]
    is_long: bool = False

    @property
    def kind(self) -> Literal["add", "cat"]:
        """How it meets the body's result."""
        return "cat" if op_name(self.join) == "cat" else "add"

    @property
    def source(self) -> fx.Node:
        """The tensor that the join reads."""
        return operands(self.join)[self.operand]


def find_skips(program: Program) -> list[Skip]:
    """All skips, in the order of their joins: from the bottleneck of a U-Net outwards."""
    reach = _Reach(program.graph)
    levels = _Levels(program)
    joins = [node for node in program.graph.nodes if _is_join(node, levels)]
    found = [skip for join in joins for skip in _skips_into(join, reach)]
    crossing = {skip for skip in found if _crosses(skip, levels)}
    single = [skip for skip in found if skip.kind == "cat" and _is_single(skip, found)]
    for one in single:
        for other in single:
            if reach.encloses(one, other):
                crossing |= {one, other}
    return [replace(skip, is_long=skip in crossing) for skip in found]


def long_skips(program: Program) -> list[Skip]:
    """The skips of a U-Net, from the bottleneck outwards."""
    return [skip for skip in find_skips(program) if skip.is_long]


def operands(join: fx.Node) -> list[fx.Node]:
    """The tensors that a sum or a concatenation puts together."""
    given = join.args[0] if op_name(join) == "cat" else join.args[:2]
    return [n for n in given if isinstance(n, fx.Node)]  # type: ignore[union-attr]


def is_layer(node: fx.Node) -> bool:
    """Whether a call mixes places or channels by a weight."""
    kind = KINDS.get(node.target, "")
    if kind not in CODABLE or kind == "embedding" or adapter_of(node):
        return False
    weight = node.args[TABLE[kind].weight]
    return isinstance(weight, fx.Node) and not depends_on_input(weight)


class _Reach:
    """What comes before what, as sets of bits."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.number = {node: number for number, node in enumerate(self.nodes)}
        self.before: list[int] = []
        for number, node in enumerate(self.nodes):
            bits = 1 << number
            for operand in node.all_input_nodes:
                bits |= self.before[self.number[operand]]
            self.before.append(bits)
        self.layers = [node for node in self.nodes if is_layer(node)]

    def leads(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether `second` is computed from `first`, or is it."""
        return bool(self.before[self.number[second]] >> self.number[first] & 1)

    def body(self, fork: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Layers on the ways from `fork` to `end`, both in it but the fork."""
        return tuple(
            layer for layer in self.layers
            if layer is not fork and self.leads(fork, layer) and self.leads(layer, end)
        )  # fmt: skip

    def encloses(self, outer: Skip, inner: Skip) -> bool:
        """Whether the inner skip lies within the body of the outer one."""
        others = [n for n in operands(outer.join) if n is not outer.source]
        return (
            outer.fork is not inner.fork
            and self.leads(outer.fork, inner.fork)
            and outer.join is not inner.join
            and any(self.leads(inner.join, other) for other in others)
        )


def _skips_into(join: fx.Node, reach: _Reach) -> Iterator[Skip]:
    parts = operands(join)
    for place, part in enumerate(parts):
        others = [other for other in parts if other is not part]
        ways = [
            found
            for other in others
            for found in _ways(part, other, reach, into_sum=op_name(join) == "add")
        ]
        if not ways:
            continue
        fork, projection, body = min(
            ways, key=lambda way: (len(way[1]), -reach.number[way[0]], -len(way[2]))
        )
        yield Skip(join, place, fork, projection, body)
        if op_name(join) == "add":
            return


def _is_join(node: fx.Node, levels: _Levels) -> bool:
    if node.op != "call_function" or op_name(node) not in ("add", "cat"):
        return False
    parts = operands(node)
    if len(parts) < 2 or not all(isinstance(p.meta.get("val"), Tensor) for p in parts):
        return False
    if not all(depends_on_input(part) for part in parts):
        return False
    shapes = [levels.shape(part) for part in parts]  # as expressions, equal ones may differ
    if op_name(node) == "add":
        return shapes[0] == shapes[1]
    axis = int(node.args[1] if len(node.args) > 1 else 0) % len(shapes[0])  # type: ignore[arg-type]
    return axis in (1, len(shapes[0]) - 1)


Way = tuple[fx.Node, tuple[fx.Node, ...], tuple[fx.Node, ...]]


def _ways(part: fx.Node, other: fx.Node, reach: _Reach, *, into_sum: bool) -> Iterator[Way]:
    """(fork, projection, body) of every way by which `part` may be a skip past `other`."""
    if reach.leads(other, part):
        return  # it is the body's result
    stack: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(part, ())]
    seen: set[tuple[fx.Node, int]] = set()
    while stack:
        node, passed = stack.pop()
        if (node, len(passed)) in seen or not depends_on_input(node):
            continue
        seen.add((node, len(passed)))
        if reach.leads(node, other):
            body = reach.body(node, other)
            if len(body) > len(passed) or any(not _is_pointwise(layer) for layer in body):
                yield node, passed, body
            continue
        name = op_name(node)
        if into_sum and not passed and is_layer(node) and _is_pointwise(node):
            stack.append((node.args[0], (node,)))  # type: ignore[arg-type]
        elif name in PASSING or (into_sum and name in POOLS) or (not into_sum and name == "add"):
            data = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            stack.extend((n, passed) for n in data)


def _is_pointwise(layer: fx.Node) -> bool:
    kind = TABLE[KINDS[layer.target]]
    if not kind.spatial:
        return True
    return all(side == 1 for side in layer.args[kind.weight].meta["val"].shape[2:])  # type: ignore[union-attr]


def _is_single(skip: Skip, found: list[Skip]) -> bool:
    return sum(s.kind == "cat" and s.source is skip.source for s in found) == 1


class _Levels:
    """How many places the values of a program have, at the sizes of its examples."""

    def __init__(self, program: Program) -> None:
        self.sizes: dict[sympy.Symbol, int] = {}
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node, example in zip(placeholders, program.examples, strict=True):
            for size, known in zip(shape_of(node.meta["val"]), example.shape, strict=True):
                if isinstance(size, sympy.Symbol):
                    self.sizes[size] = int(known)

    def places(self, node: fx.Node) -> int:
        """Of a tensor (batch, channels, *places)."""
        return math.prod(self.shape(node)[2:])

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._known(size) for size in shape_of(node.meta["val"]))

    def _known(self, size: Size) -> int:
        return int(sympy.sympify(size).xreplace(self.sizes))


def _crosses(skip: Skip, levels: _Levels) -> bool:
    """Whether the body works on fewer places than the skip has, and comes back to as many.

    One place is no level in the body of a sum: squeeze and excitation looks at it.
    """
    rank = len(shape_of(skip.fork.meta["val"]))
    if rank < 3 or len(shape_of(skip.join.meta["val"])) != rank:
        return False
    own = levels.places(skip.fork)
    if skip.kind == "add" and levels.places(skip.join) != own:
        return False
    inside = [n for n in skip.body if len(shape_of(n.meta["val"])) == rank]
    least = 0 if skip.kind == "cat" else 1
    return any(least < levels.places(n) < own for n in inside)
