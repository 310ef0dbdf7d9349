"""Feed-forward parts: projections up, calls on each element, one projection down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir.channels import ChannelGroup, channel_groups
from graphwright.ir.graph.nodes import VIEWS, op_name
from graphwright.ir.layers.kinds import INPUT_AXIS, OUTPUT_AXIS
from graphwright.ir.layers.products import input_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program

MOVES = VIEWS | {"clone"}


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward part.

    Attributes:
        down: the layer that reads the hidden units.
        ups: the layers that make them.
        group: them, as units that are removed together.
        units: (hidden,) unit of each column of the down projection.
    """

    down: Layer
    ups: tuple[Layer, ...]
    group: ChannelGroup
    units: Tensor


def feed_forwards(
    program: Program, layers: Sequence[Layer], taken: set[fx.Node]
) -> Iterator[tuple[Layer, FeedForward | str]]:
    """Every layer that reads other ones through calls on each element, or why that is no part.

    Args:
        program: the program.
        layers: products with a matrix.
        taken: calls of layers that belong to attentions.
    """
    by_node = {layer.node: layer for layer in layers}
    groups: list[ChannelGroup] | None = None
    for down in layers:
        if down.node in taken:
            continue
        ups, strange = _behind(down, by_node)
        if not ups or any(up.node in taken for up in ups):
            continue
        if strange is None:
            groups = channel_groups(program, unit="channel") if groups is None else groups
        yield down, strange or _part(program, down, ups, groups or [])


def _behind(down: Layer, by_node: dict[fx.Node, Layer]) -> tuple[list[Layer], str | None]:
    """The layers that a layer reads through calls on each element, and what else is in between."""
    ups: dict[fx.Node, Layer] = {}
    stack, seen = [input_node(down)], set()
    strange: str | None = None
    while stack and strange is None:
        node = stack.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor | list | tuple):
            continue
        seen.add(node)
        if node in by_node:
            ups[node] = by_node[node]
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node) in MOVES:
            stack.extend(node.all_input_nodes)
        elif node.op != "get_attr":
            strange = f"its hidden units go through {op_name(node) or node.op}"
    return list(ups.values()), strange


def _part(
    program: Program, down: Layer, ups: list[Layer], groups: list[ChannelGroup]
) -> FeedForward | str:
    key = (down.weight, INPUT_AXIS[down.kind])
    group = next((g for g in groups if any((m.parameter, m.dim) == key for m in g.members)), None)
    if group is None:
        return "its hidden units are no units of one group"
    if not group.prunable:
        return f"its hidden units are fixed: {group.reason}"
    hidden = int(input_node(down).meta["val"].shape[-1])
    units = torch.full((hidden,), -1)
    for unit in range(group.units):
        own = group.slices(unit).get(key)
        if own is None or own.size != 1:
            return "a hidden unit is several columns of its weight"
        units[int(own.item())] = unit
    if bool((units < 0).any()):
        return "not all of its columns are hidden units"
    known = {key, *((up.weight, OUTPUT_AXIS[up.kind]) for up in ups)}
    rest = [m.parameter for m in group.members if (m.parameter, m.dim) not in known]
    others = [name for name in rest if program.state[name].dim() > 1]
    if others:
        return f"its hidden units are also those of {others[0]}"
    return FeedForward(down, tuple(ups), group, units)
