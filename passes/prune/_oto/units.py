"""Zero-invariant groups as a training loop sees them: every unit's slices of the live tensors.

A unit of the channel analysis is all that is cut with a channel. Its zero-invariant group is the
part that makes the channel zero (Chen et al. 2023, "OTOv2", section 3.1): rows that produce it,
biases, norm weights. Columns that only read a channel of exact zeros are no part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.extents import Extents
from graphwright.ir.channels.values import Value
from graphwright.ir.channels.weights import is_weight, only_added
from graphwright.ir.layers.kinds import INPUT_AXIS, TURNED
from graphwright.ir.layers.selectors import Layer, layers

Tensors = Mapping[str, Tensor]
Key = tuple[str, int]


@dataclass(frozen=True)
class Slot:
    """One dimension of one tensor: the unit of every position, or the number of units for none."""

    name: str
    dim: int
    unit: Tensor


class Units:
    """The units of some groups, numbered group after group.

    Attributes:
        groups: the groups.
        count: units in all.
        slots: what makes up the zero-invariant groups.
        readers: the columns that read a unit's channels, of tensors in training.
        sizes: values in the zero-invariant group of each unit, float64.
    """

    def __init__(
        self, groups: Sequence[ChannelGroup], names: Mapping[str, str], read: set[Key]
    ) -> None:
        """Finds the slots.

        Args:
            groups: prunable groups of one analysis.
            names: the live tensor's name by the name in the analysis.
            read: what `read_only` gives.
        """
        self.groups = tuple(groups)
        self.analysis: Analysis = groups[0].analysis
        self.count = sum(g.units for g in groups)
        self.ends = np.cumsum([g.units for g in groups])[:-1]
        number = np.full(self.analysis.count, self.count)
        number[np.concatenate([g.classes for g in groups])] = np.arange(self.count)
        made: list[Slot] = []
        readers: list[Slot] = []
        for key, classes in self.analysis.stored.items():
            units = number[classes]
            if key[0] in names and (units < self.count).any():
                slot = Slot(names[key[0]], key[1], torch.from_numpy(units))
                (readers if key in read else made).append(slot)
        self.slots, self.readers = tuple(made), tuple(readers)
        self._numel = {names[n]: self.analysis.program.state[n].numel() for n in names}
        self.names = tuple(dict.fromkeys(slot.name for slot in made))
        self._index = torch.cat([slot.unit for slot in made])
        self._cleared = torch.zeros(self.count, dtype=torch.bool)
        self._places: list[tuple[Slot, Tensor]] = []

    @cached_property
    def sizes(self) -> Tensor:
        total = torch.zeros(self.count + 1, dtype=torch.float64)
        for slot in self.slots:
            each = self._numel[slot.name] / len(slot.unit)
            total += each * torch.bincount(slot.unit, minlength=self.count + 1)
        return total[:-1]

    def sums(self, *pairs: tuple[Tensors, Tensors]) -> list[Tensor]:
        """Sum of a * b over the values of every unit, for each pair (a, b); float64, on the CPU."""
        parts = []
        for a, b in pairs:
            for slot in self.slots:
                x, y = a[slot.name].detach(), b[slot.name].detach()
                parts.append(_rest(x * y if x.element_size() > 2 else x.float() * y, slot.dim))
        return list(self._added(parts, len(pairs)))

    def zeros(self, tensors: Tensors) -> Tensor:
        """Flag per unit: all its values are exactly zero."""
        parts = [_rest(tensors[s.name].detach() != 0, s.dim) for s in self.slots]
        return self._added(parts, 1)[0] == 0

    def _added(self, parts: list[Tensor], count: int) -> Tensor:
        """(count, units): positions added up by unit, in a fixed order, off the device at once."""
        rows = torch.cat(parts).cpu().reshape(count, -1)
        found = torch.zeros(count, self.count + 1, dtype=torch.float64)
        return found.index_add_(1, self._index, rows)[:, :-1]

    def factors(self, tensors: Tensors, values: Tensor, rest: float) -> list[tuple[Slot, Tensor]]:
        """A value per unit as a factor of every slot's tensor; `rest` where there is no unit."""
        padded = torch.cat([values.double(), torch.tensor([rest], dtype=torch.float64)])
        flat = padded[self._index].to(tensors[self.names[0]].device)
        pieces = flat.split([len(slot.unit) for slot in self.slots])
        found = []
        for slot, piece in zip(self.slots, pieces, strict=True):
            x = tensors[slot.name]
            shape = [-1 if d == slot.dim else 1 for d in range(x.dim())]
            found.append((slot, piece.to(x.device, x.dtype).reshape(shape)))
        return found

    def scale(self, tensors: Tensors, values: Tensor) -> None:
        """Multiplies every unit's values by its factor, in place."""
        for slot, factor in self.factors(tensors, values, 1.0):
            tensors[slot.name].mul_(factor)

    def clear(self, tensors: Tensors, units: Tensor) -> None:
        """Sets units to zero in place, with the columns that read them.

        Args:
            tensors: live tensors.
            units: flag per unit.
        """
        if not torch.equal(units, self._cleared):
            self._cleared = units.clone()
            padded = torch.cat([units, units.new_zeros(1)])
            places = [(slot, padded[slot.unit].nonzero().ravel().to(tensors[slot.name].device))
                      for slot in (*self.slots, *self.readers)]  # fmt: skip
            self._places = [(slot, where) for slot, where in places if len(where)]
        for slot, where in self._places:
            tensors[slot.name].index_fill_(slot.dim, where, 0)

    def by_group(self, values: np.ndarray) -> list[np.ndarray]:
        """A value per unit, cut into groups."""
        return np.split(values, self.ends)

    def picks(self, units: Tensor, divisible: int) -> dict[ChannelGroup, list[int]]:
        """The units to cut: the flagged ones, but for those that a group's kept number needs.

        A group keeps a multiple of `divisible`, and a dimension keeps at least one position, so
        that some zero units may stay.
        """
        chosen: dict[ChannelGroup, list[int]] = {}
        for group, flags in zip(self.groups, self.by_group(units.numpy()), strict=True):
            zero = np.flatnonzero(flags)
            kept = max(1, group.units - len(zero))
            most = group.units - -(-kept // divisible) * divisible
            if most > 0:
                chosen[group] = zero[:most].tolist()
        while chosen and (stuck := self._emptied(chosen)) is not None:
            for group in list(chosen):
                inside = np.isin(group.classes[chosen[group]], stuck)
                if inside.any():
                    del chosen[group]
                    break
        return chosen

    def _emptied(self, chosen: Mapping[ChannelGroup, list[int]]) -> np.ndarray | None:
        removed = np.zeros(self.analysis.count, bool)
        for group, units in chosen.items():
            removed[group.classes[units]] = True
        empty = Extents(self.analysis, removed).emptied()
        return None if empty is None else empty[1]


def _rest(values: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but one, in float64."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others, dtype=torch.float64) if others else values.double()


def untrainable(group: ChannelGroup, names: Mapping[str, str], read: set[Key]) -> str:
    """The reason why training cannot bring a group's units to zero; empty when it can.

    Args:
        group: a prunable group.
        names: the live tensor's name by the name in the analysis.
        read: what `read_only` gives.
    """
    program = group.analysis.program
    for member in group.members:
        name = member.parameter
        if name in names or (name, member.dim) in read:
            continue
        if is_weight(program, name):
            return f"weight {name} is not in training"
        if only_added(program, name):
            return f"table {name} is added to its channels and is not in training"
    return ""


def read_only(analysis: Analysis) -> set[Key]:
    """(name, dimension) of weights that only read along it, and only channels that can be zero.

    A column that reads sigmoid(channel), say, is part of the unit: the channel is never zero.
    """
    uses: dict[str, list[int | None]] = {}
    calls = set()
    for layer in layers(analysis.program, INPUT_AXIS):
        owner = analysis.owners.get(layer.weight)
        if owner is not None:
            calls.add(layer.node.name)
            uses.setdefault(owner, []).append(_read_dim(analysis, layer))
    found = {}
    for name, dims in uses.items():
        if dims[0] is not None and all(dim == dims[0] for dim in dims):
            found[name] = dims[0]
    for node in analysis.program.graph.nodes:
        if node.op == "get_attr" and any(user.name not in calls for user in node.users):
            found.pop(analysis.owners.get(str(node.target), ""), None)
    return set(found.items())


def _read_dim(analysis: Analysis, layer: Layer) -> int | None:
    """The weight's dimension that is summed over; None where a removed channel is not zero."""
    node = layer.node.args[1 if layer.kind == "addmm" else 0]
    value = analysis.values.get(getattr(node, "name", ""))
    weight = analysis.program.state[layer.weight]
    if not isinstance(value, Value):
        return None
    spatial = int(layer.kind[-2]) if "conv" in layer.kind else 0
    channels = value.at(len(value.shape) - 1 - spatial)
    if channels is not None and not channels.zero:
        return None
    # The matrix of a batched product stands in its last two dimensions.
    return weight.dim() - 2 if layer.kind in TURNED else INPUT_AXIS[layer.kind]
