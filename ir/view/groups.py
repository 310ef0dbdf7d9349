"""Channel groups as a graph to draw: a box per group, an arrow where one feeds another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import networkx as nx

from graphwright.ir.channels.groups import ChannelGroup
from graphwright.ir.view.table import Block

INPUT_DIM = {0: 1, 1: 0}
"""The two leading dimensions of a matrix or kernel: one makes channels, the other reads them."""


def group_blocks(groups: Sequence[ChannelGroup]) -> nx.DiGraph:
    """An acyclic graph with a `block` per group, for `draw_blocks`.

    A layer whose columns belong to one group and whose rows belong to another is an arrow. Arrows
    that lead back (a residual branch into its own stream) are left out. Groups that may not be
    pruned are shown where they meet one that may.
    """
    graph = nx.DiGraph()
    order = {id(group): place for place, group in enumerate(groups)}
    by_id = {id(group): group for group in groups}
    shown = {key for key, group in by_id.items() if group.prunable}
    arrows = set()
    for source, target in _feeds(groups):
        if {id(source), id(target)} & shown:
            arrows.add((id(source), id(target)))
    used = shown | {key for arrow in arrows for key in arrow}
    for key in sorted(used, key=order.__getitem__):
        graph.add_node(order[key], block=_block(by_id[key]))
    for a, b in sorted((order[a], order[b]) for a, b in arrows):
        if a != b and not nx.has_path(graph, b, a):
            graph.add_edge(a, b)
    return graph


def _feeds(groups: Sequence[ChannelGroup]) -> list[tuple[ChannelGroup, ChannelGroup]]:
    """(the group that a matrix reads, the group that it makes)."""
    holders: dict[tuple[str, int], list[ChannelGroup]] = defaultdict(list)
    for group in groups:
        for member in group.members:
            holders[member.parameter, member.dim].append(group)
    found = []
    for (name, dim), makers in holders.items():
        if dim != 0:
            continue
        readers = holders.get((name, INPUT_DIM[dim]), [])
        found += [(reader, maker) for reader in readers for maker in makers]
    return found


def _block(group: ChannelGroup) -> Block:
    detail = f"{group.units} units in {len(group.members)} tensors"
    if group.prunable:
        detail += f", {group.parameters:,.0f} parameters each"
    else:
        detail = f"{group.units} kept: {group.reason}"
    members = ", ".join(member_text(group, most=20))
    return Block(group.name, detail, "product" if group.prunable else "other",
                 tooltip=f"{group.name}: {detail}. Slices of {members}")  # fmt: skip


def member_text(group: ChannelGroup, most: int) -> list[str]:
    """`name:dim` of each member, with the positions per unit where there are several."""
    texts = [f"{m.parameter}:{m.dim}" + (f" x{m.slices}" if m.slices > 1 else "")
             for m in group.members[:most]]  # fmt: skip
    rest = len(group.members) - most
    return [*texts, f"{rest} more"] if rest > 0 else texts
