"""Channel groups: what can be removed together, and why something cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from graphwright.ir.channels.classes import Ids

if TYPE_CHECKING:
    from graphwright.ir.channels.analysis import Analysis


@dataclass(frozen=True)
class Member:
    """Slices of one dimension of a stored tensor that belong to a group.

    Attributes:
        parameter: name in the program's state.
        dim: dimension that is sliced.
        slices: positions of that dimension per unit (the most that one unit has).
    """

    parameter: str
    dim: int
    slices: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that are slices of the same tensors. One unit is removed as a whole.

    Attributes:
        name: owner of the member that produces the channels, and its dimension: `conv1.weight:0`.
        units: how many.
        members: the tensors that a unit has slices of.
        prunable: whether units may be removed.
        reason: the node that forbids it, and why; empty when prunable.
        parameters: parameter values that go with one unit, on average (a value in two units of
            the group counts once for each).
        bytes: bytes of these.
        macs: multiply-accumulates that go with one unit at the example sizes, on average.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    prunable: bool
    reason: str
    parameters: float
    bytes: float
    macs: float
    classes: Ids = field(repr=False)
    """Class of each unit."""
    analysis: Analysis = field(repr=False)

    def __repr__(self) -> str:
        state = "prunable" if self.prunable else f"fixed: {self.reason}"
        return f"ChannelGroup({self.name}, {self.units} units, {state})"

    def slices(self, unit: int) -> dict[tuple[str, int], Ids]:
        """Positions of one unit, by (tensor name, dimension)."""
        wanted = self.classes[unit]
        found = {
            (m.parameter, m.dim): np.flatnonzero(self.analysis.stored[m.parameter, m.dim] == wanted)
            for m in self.members
        }
        return {key: where for key, where in found.items() if where.size}


def build_groups(analysis: Analysis) -> list[ChannelGroup]:
    """All groups of a program, in the order of their first member."""
    members = list(analysis.stored)
    is_parameter = np.array([_is_parameter(analysis, name) for name, _ in members])
    if not members:
        return []
    keys = [ids * len(members) + number for number, ids in enumerate(analysis.stored.values())]
    pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
    classes, of = np.divmod(pairs, len(members))
    with_parameter = np.zeros(analysis.count, bool)
    with_parameter[classes[is_parameter[of]]] = True
    alive = with_parameter[classes]
    classes, of, counts = classes[alive], of[alive], counts[alive]
    parameters, sizes = _weights(analysis, members, classes, of, counts)
    costs = (parameters, sizes, analysis.macs_per_class())
    return [
        _group(analysis, [members[m] for m in signature], slices, units, costs)
        for signature, slices, units in _by_signature(classes, of, counts, len(members), analysis)
    ]


def _by_signature(
    classes: Ids, of: Ids, counts: Ids, members: int, analysis: Analysis
) -> Iterator[tuple[list[int], list[int], Ids]]:
    """(member numbers, most slices of a unit in each, classes) of every group.

    A group is all classes with the same set of members that are pinned or free alike.
    """
    weights = np.random.default_rng(0).integers(1, 2**62, members, dtype=np.int64)
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    unique = classes[starts]
    with np.errstate(over="ignore"):
        signature = np.add.reduceat(weights[of], starts)  # a random hash of the set
        signature = signature * 2 + analysis.pinned[unique]
    _, group_of, sizes = np.unique(signature, return_inverse=True, return_counts=True)
    row_group = np.repeat(group_of, np.diff(starts, append=len(classes)))
    most = np.zeros((len(sizes), members), np.int64)
    np.maximum.at(most, (row_group, of), counts)
    order = np.argsort(group_of, kind="stable")
    found = []
    for number, run in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        signed = np.flatnonzero(most[number])
        found.append((signed.tolist(), most[number, signed].tolist(), unique[run]))
    yield from sorted(found, key=lambda item: (item[0], item[2][0]))


def _weights(
    analysis: Analysis, members: Sequence[tuple[str, int]], classes: Ids, of: Ids, counts: Ids
) -> tuple[np.ndarray, np.ndarray]:
    """Parameter values and bytes in the slices of each class; a value in two slices counts once."""
    parameters, sizes = np.zeros(analysis.count), np.zeros(analysis.count)
    total = np.array([_numel(analysis, name) for name, _ in members], float)
    extent = np.array([len(ids) for ids in analysis.stored.values()], float)
    width = np.array([analysis.program.state[name].element_size() for name, _ in members], float)
    names = {name: n for n, name in enumerate(dict.fromkeys(name for name, _ in members))}
    tensor = np.array([names[name] for name, _ in members])[of]
    kept = 1 - counts / extent[of]
    order = np.lexsort((tensor, classes))
    first = np.flatnonzero(
        np.concatenate([[True], (np.diff(classes[order]) != 0) | (np.diff(tensor[order]) != 0)])
    )
    remaining = np.multiply.reduceat(kept[order], first) if len(order) else np.zeros(0)
    gone = (1 - remaining) * total[of[order[first]]]
    np.add.at(parameters, classes[order[first]], gone)
    np.add.at(sizes, classes[order[first]], gone * width[of[order[first]]])
    return parameters, sizes


def _numel(analysis: Analysis, name: str) -> int:
    return analysis.program.state[name].numel() if _is_parameter(analysis, name) else 0


def _is_parameter(analysis: Analysis, name: str) -> bool:
    return name in analysis.weights


def _group(
    analysis: Analysis,
    keys: list[tuple[str, int]],
    slices: list[int],
    units: Ids,
    costs: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> ChannelGroup:
    reason = ""
    if analysis.pinned[units[0]]:
        reason = analysis.reason(units)
    elif len(units) == 1:
        reason = "it has a single unit: removing it would empty a dimension"
    own = [key for key in keys if _is_parameter(analysis, key[0])]
    # a matrix's rows produce channels, its columns and a norm's vectors only read them
    produces = [k for k in own if k[1] == 0 and analysis.program.state[k[0]].dim() > 1]
    name, dim = (produces or own)[0]
    parameters, sizes, macs = (float(cost[units].mean()) for cost in costs)
    members = tuple(Member(n, d, s) for (n, d), s in zip(keys, slices, strict=True))
    return ChannelGroup(f"{name}:{dim}", len(units), members, not reason, reason,
                        parameters, sizes, macs, units, analysis)  # fmt: skip
