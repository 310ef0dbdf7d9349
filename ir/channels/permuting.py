"""Units in another order: the same function, with the slices of every member moved together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from graphwright.ir.channels.classes import Ids
from graphwright.ir.channels.cutting import like, prepared, resolve, retied
from graphwright.ir.channels.groups import ChannelGroup
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program

Orders = Mapping[ChannelGroup, Sequence[int]]


def permute(program: Program, orders: Orders) -> Program:
    """The program with the units of groups in another order.

    The graph stays as it is, and so does the function: units of a group have slices of the same
    tensors, and a convolution in groups makes units of as many channels as it has groups.

    Args:
        program: left as it is; the one the groups were found on, or one with the same graph.
        orders: by group, the old unit that comes to every place.

    Raises:
        ArgumentError: an order is no permutation of the units, units differ in their number of
            slices, or the groups are of another program.
    """
    if not orders:
        return program
    program = prepared(program)
    analysis, _ = resolve(program, dict.fromkeys(orders, ()))
    state = dict(program.state)
    for group, order in orders.items():
        if sorted(order) != list(range(group.units)):
            raise ArgumentError(f"the order of group {group.name} is no permutation of its "
                                f"{group.units} units")  # fmt: skip
        for (name, dim), source in _sources(group, order).items():
            moved = state[name].detach().index_select(dim, torch.from_numpy(source))
            state[name] = like(program.state[name], moved)
    return program.replace(state=retied(program, state, analysis))


def _sources(group: ChannelGroup, order: Sequence[int]) -> dict[tuple[str, int], Ids]:
    """By tensor and dimension: the old position that comes to every position."""
    slices = [group.slices(unit) for unit in range(group.units)]
    found: dict[tuple[str, int], Ids] = {}
    for member in group.members:
        key = (member.parameter, member.dim)
        places = [unit[key] for unit in slices if key in unit]
        if len(places) < group.units or any(len(p) != member.slices for p in places):
            raise ArgumentError(f"units of group {group.name} have unlike slices of {key[0]}")
        source = np.arange(len(group.analysis.stored[key]))
        for place, unit in enumerate(order):
            source[places[place]] = places[unit]
        found[key] = source
    return found
