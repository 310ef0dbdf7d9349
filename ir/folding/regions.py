"""Finds stretches between two nodes that are one convolution, and folds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, fx

from graphwright.ir.action import Action
from graphwright.ir.edit import Editor
from graphwright.ir.folding.convolved import Convolved, NotFoldable
from graphwright.ir.folding.emit import emit, owner
from graphwright.ir.folding.rules import LAYERS, data_operands, made_by
from graphwright.ir.graph.constants import Stored
from graphwright.ir.graph.nodes import adapter_of, op_name

BranchKind = Literal["kernel", "strip", "pointwise", "average", "identity", "sequence"]

SINGLE = frozenset({"batch_norm", "mul", "div", "neg", "pad", "constant_pad_nd", "slice"})
"""Calls that a branch goes on behind."""


@dataclass(frozen=True)
class Branch:
    """One operand of a stretch's sum.

    Attributes:
        kind: `kernel` (a convolution with equal sides), `strip` (with unequal sides), `pointwise`
            (1x1, or a linear layer), `average` (a pooling), `identity` (no layer), or `sequence`
            (several layers).
        layers: its layers, from the input on.
    """

    kind: BranchKind
    layers: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Region:
    """All nodes between `start` (not in it) and `end` (in it); nothing else reads or is read.

    Attributes:
        start: what the stretch reads.
        end: its result.
        nodes: in graph order.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def axes(self) -> int:
        """Spatial axes; 0 where it is made of linear layers."""
        is_linear = any(op_name(node) == "linear" for node in self.nodes)
        return 0 if is_linear else int(self.start.meta["val"].dim()) - 2

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """Nodes that mix places or channels."""
        return tuple(node for node in self.nodes if op_name(node) in LAYERS)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The operands of the sum (or of the join of channels) that ends it; one without such."""
        return tuple(_branch(self, term) for term in _terms(self, self.end))


def regions_from(start: fx.Node) -> Iterator[Region]:
    """Every closed stretch behind `start` that rules are for, the longest first.

    Whether it really is one convolution is not known yet; `convolved` says so.
    """
    value = start.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    members = _members(start)
    for end in reversed(members):
        nodes = _behind(end, members)
        inside = set(nodes)
        if all(set(n.users) <= inside for n in nodes if n is not end):
            yield Region(start, end, tuple(sorted(nodes)))


def fold(
    editor: Editor, wanted: Callable[[Region], bool], at_most: float = 1.0
) -> tuple[list[Action], list[Action]]:
    """Puts one layer in the place of every wanted stretch that is one.

    Args:
        editor: changed.
        wanted: which stretches.
        at_most: multiplications that the one layer may take, as a share of the stretch's.

    Returns:
        what was folded, and what was not, with the reason.
    """
    done: dict[str, Action] = {}
    left: dict[str, Action] = {}
    again = True
    while again:
        again = False
        for start in list(editor.graph.nodes):
            while not start._erased and _fold_from(editor, start, wanted, at_most, done, left):
                again = True
    return list(done.values()), [a for name, a in left.items() if name not in done]


def _fold_from(
    editor: Editor,
    start: fx.Node,
    wanted: Callable[[Region], bool],
    at_most: float,
    done: dict[str, Action],
    left: dict[str, Action],
) -> bool:
    for region in regions_from(start):
        if len(region.nodes) < 2 or not wanted(region):
            continue
        name = owner(editor, region.layers)
        try:
            maps = _all_maps(editor, region)
            _refuse_costly(editor, region, maps, at_most)
            emit(editor, region.start, region.end, maps[region.end], name, set(region.nodes))
        except NotFoldable as reason:
            left.setdefault(name, Action.left(name, str(reason)))
            continue
        for node in reversed(region.nodes):
            if not node._erased and not node.users:
                editor.erase(node)
        kinds = ", ".join(branch.kind for branch in region.branches)
        done[name] = Action(name, f"one layer of {len(region.branches)} branches: {kinds}")
        return True
    return False


def convolved(program: Stored, region: Region) -> Convolved:
    """The stretch as one map.

    Raises:
        NotFoldable: it is none; the reason names the node.
    """
    return _all_maps(program, region)[region.end]


def _all_maps(program: Stored, region: Region) -> dict[fx.Node, Convolved]:
    shape = region.start.meta["val"].shape
    channels = shape[1 if region.axes else -1]
    if not isinstance(channels, int) or region.axes not in (0, 1, 2, 3):
        raise NotFoldable(f"{region.start.name} has no known number of channels")
    maps = {region.start: Convolved.identity(channels, region.axes)}
    for node in region.nodes:
        if node.meta["val"].dim() != len(shape):
            raise NotFoldable(f"{node.name} has another number of dimensions")
        try:
            maps[node] = made_by(program, node, maps)
        except NotFoldable as reason:
            raise NotFoldable(f"{node.name} {reason}") from None
    if not maps[region.end].is_whole:
        raise NotFoldable(f"{region.end.name} has a border that does not follow from the input")
    return maps


def _refuse_costly(
    program: Stored, region: Region, maps: dict[fx.Node, Convolved], at_most: float
) -> None:
    made, before = maps[region.end], 0.0
    for node in region.layers:
        weight = node.args[1]
        if isinstance(weight, fx.Node):
            size = program.state[str(weight.target)].numel()
            before += size * maps[node].places(made.stride)
    share = made.kernel.numel() / before if before else 0.0
    if share > at_most:
        raise NotFoldable(f"one layer would take {share:.2f} times the multiplications")


def _members(start: fx.Node) -> list[fx.Node]:
    """Nodes that are functions of `start` alone by operators that rules are for."""
    found, stack = {start}, sorted(start.users)
    while stack:
        node = stack.pop(0)
        if node in found or adapter_of(node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        operands = data_operands(node)
        if operands and all(n in found for n in operands):
            found.add(node)
            stack = sorted({*stack, *node.users})
    return sorted(found - {start})


def _behind(end: fx.Node, members: list[fx.Node]) -> list[fx.Node]:
    """`end` and all it is computed from, among the members."""
    known, found, stack = set(members), {end}, [end]
    while stack:
        for operand in data_operands(stack.pop()):
            if operand in known and operand not in found:
                found.add(operand)
                stack.append(operand)
    return list(found)


def _terms(region: Region, node: fx.Node) -> list[fx.Node]:
    """The operands of the last sum; `node` alone where its last layer comes before any sum."""
    inside = {region.start, *region.nodes}
    operands = [n for n in data_operands(node) if n in inside] if node in region.nodes else []
    if op_name(node) in ("add", "sub", "cat") and len(operands) > 1:
        return [term for operand in operands for term in _terms(region, operand)]
    if op_name(node) in ("add", "sub") and len(node.all_input_nodes) == 1 and operands:
        return [operands[0], operands[0]] if node.args[0] is node.args[1] else [node]
    if op_name(node) in SINGLE and len(operands) == 1:
        below = _terms(region, operands[0])
        return below if len(below) > 1 else [node]
    return [node]


def _branch(region: Region, term: fx.Node) -> Branch:
    inside = set(region.nodes)
    found: list[fx.Node] = []
    stack, seen = [term], set()
    while stack:
        node = stack.pop()
        if node in seen or node not in inside:
            continue
        seen.add(node)
        if op_name(node) in LAYERS:
            found.append(node)
        stack.extend(data_operands(node))
    layers = tuple(sorted(found, key=region.nodes.index))
    return Branch(_kind(layers), layers)


def _kind(layers: tuple[fx.Node, ...]) -> BranchKind:
    if not layers:
        return "identity"
    if len(layers) > 1:
        return "sequence"
    (layer,) = layers
    if op_name(layer).startswith("avg_pool"):
        return "average"
    sides = tuple(layer.args[1].meta["val"].shape[2:])  # type: ignore[union-attr]
    if all(side == 1 for side in sides):
        return "pointwise"
    return "kernel" if len(set(sides)) == 1 else "strip"
