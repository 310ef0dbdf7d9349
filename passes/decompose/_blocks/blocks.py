"""The blocks of a transformer that a program holds, as far as they can be decomposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from graphwright.ir.adapters.record import adapters
from graphwright.ir.layers.kinds import EXPERTS, MATRICES, PRODUCTS
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.program import Program
from graphwright.passes.base import Action
from graphwright.passes.decompose._attention.find import Attention, attentions
from graphwright.passes.decompose._attention.layout import Unlike
from graphwright.passes.decompose._attention.rebuild import check_readers
from graphwright.passes.decompose._blocks.feed_forward import FeedForward, feed_forwards
from graphwright.passes.decompose._blocks.influence import Join, join

Doing = tuple[bool, bool]
"""Whether scores, and whether values are to become narrower."""


@dataclass
class Block:
    """Parts that follow each other: an attention, and the feed-forward parts up to the next.

    Attributes:
        attentions: at most one.
        feed_forwards: in order.
        doing: by name of an attention's output layer.
    """

    attentions: list[Attention] = field(default_factory=list)
    feed_forwards: list[FeedForward] = field(default_factory=list)
    doing: dict[str, Doing] = field(default_factory=dict)

    @property
    def outs(self) -> list[Layer]:
        """The last layer of every part, in order."""
        parts = [a.out for a in self.attentions] + [f.down for f in self.feed_forwards]
        return parts

    @property
    def name(self) -> str:
        """Of its first part."""
        return self.outs[0].name

    def does(self, attention: Attention) -> Doing:
        """What is to be done to its attention."""
        return self.doing[attention.out.name]

    def joins(self, program: Program) -> tuple[Join, Join] | None:
        """Where its first and its last part enter the residual stream."""
        first, last = (join(program, self.outs[place].node) for place in (0, -1))
        return None if first is None or last is None else (first, last)


def find_blocks(program: Program, targets: Sequence[str]) -> tuple[list[Block], list[Action]]:
    """All blocks of the selected layers, in graph order, and a word on every other layer.

    Raises:
        ModelError: a pattern matches no layer.
    """
    chosen = {layer.node for layer in select(program, targets, PRODUCTS)}
    every = layers(program, MATRICES)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    parts: list[tuple[int, Attention | FeedForward, Doing]] = []
    told: dict[str, str] = {}
    taken: set[fx.Node] = set()
    for call, found in attentions(program, every):
        if isinstance(found, str):
            told[call.name] = f"attention that stays: {found}"
            continue
        mine = [p.layer for p in (found.query, found.key, found.value)] + [found.out]
        taken |= {layer.node for layer in mine}
        doing, reasons = _doing(program, found, chosen)
        told |= reasons
        if any(doing):
            parts.append((order[found.call], found, doing))
    for down, hidden in feed_forwards(program, every, taken):
        if isinstance(hidden, str):
            told[down.name] = hidden
        elif reason := _reason(program, [down, *hidden.ups], chosen):
            told[down.name] = reason
        elif join(program, down.node) is None:
            told[down.name] = "it is added to no residual stream: no part of a block"
        else:
            parts.append((order[down.node], hidden, (False, False)))
    blocks: list[Block] = []
    for _, part, doing in sorted(parts, key=lambda each: each[0]):
        if isinstance(part, Attention):
            blocks.append(Block([part], [], {part.out.name: doing}))
        else:
            blocks = blocks or [Block()]
            blocks[-1].feed_forwards.append(part)
    return blocks, _actions(program, blocks, told, chosen)


def _doing(
    program: Program, found: Attention, chosen: set[fx.Node]
) -> tuple[Doing, dict[str, str]]:
    """What can be done to an attention, and why the rest cannot."""
    sides = {
        "scores": [found.query.layer, found.key.layer],
        "values": [found.value.layer, found.out],
    }
    reasons = {}
    for side, mine in sides.items():
        reason = _reason(program, mine, chosen)
        if not reason:
            try:
                check_readers(found, scores=side == "scores" or found.is_fused,
                              values=side == "values" or found.is_fused)  # fmt: skip
            except Unlike as error:
                reason = str(error)
        if reason:
            reasons[side] = reason
    if found.is_fused and reasons:  # a layer that makes all three is parted, or stays
        reasons = dict.fromkeys(sides, next(iter(reasons.values())))
    names = {side: ", ".join(dict.fromkeys(x.name for x in mine)) for side, mine in sides.items()}
    return ("scores" not in reasons, "values" not in reasons), {
        names[side]: reason for side, reason in reasons.items()
    }


def _reason(program: Program, mine: Sequence[Layer], chosen: set[fx.Node]) -> str:
    """Why layers cannot be given other weights."""
    beside = {name for adapter in adapters(program).values() for name in adapter.layers}
    for layer in mine:
        if layer.node not in chosen:
            return f"{layer.name} is not selected"
        if not layer.weight:
            return f"the weight of {layer.name} is rebuilt in the graph"
        if layer.name in beside:
            return f"an adapter is beside {layer.name}: merge that first (adapt.merge)"
        if len(weight_node(layer).users) > 1:
            return f"the weight of {layer.name} is read more than once"
        if layer.kind == "addmm" and (len(layer.node.args) > 3 or layer.node.kwargs):
            return f"{layer.name} is addmm with factors alpha or beta"
    return ""


def _actions(
    program: Program, blocks: Sequence[Block], told: dict[str, str], chosen: set[fx.Node]
) -> list[Action]:
    """A word on every selected layer that is in no block, and on what looked like a part of one."""
    known: set[str] = set()
    for block in blocks:
        for attention in block.attentions:
            parts = (attention.query, attention.key, attention.value)
            known |= {p.layer.name for p in parts} | {attention.out.name}
        for part in block.feed_forwards:
            known |= {part.down.name, *(up.name for up in part.ups)}
    actions = [Action.left(name, reason) for name, reason in told.items() if name not in known]
    said = {name for entry in told for name in entry.split(", ")}
    for layer in layers(program, PRODUCTS):
        if layer.node in chosen and layer.name not in known | said:
            stack = "a stack of experts" if layer.kind in EXPERTS else "no part of a block"
            actions.append(Action.left(layer.name, stack))
            said.add(layer.name)
    return actions
