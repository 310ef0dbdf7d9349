"""Where the values of a tensor lie: units of channel groups, slots of a unit, and a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.channels import ChannelGroup, kept_positions
from graphwright.ir.program import Program


@dataclass(frozen=True)
class Axis:
    """One of the first two dimensions of a tensor, at a width.

    Attributes:
        units: that there are at the width.
        slots: positions of a unit: several behind a flattening, or where halves go together.
        order: the position of every slot of every unit, unit by unit.
    """

    units: int
    slots: int
    order: Tensor


@dataclass(frozen=True)
class Layout:
    """A tensor at a width.

    Attributes:
        axes: of the outputs, and of the inputs unless it is a vector.
        kernel: further sizes.
        where: positions in the tensor at full width, by dimension, where some are left out.
    """

    axes: tuple[Axis, ...]
    kernel: tuple[int, ...]
    where: dict[int, Tensor]

    @property
    def units(self) -> tuple[int, ...]:
        """Units of the outputs and inputs, which the coordinates count."""
        return tuple(axis.units for axis in self.axes)

    @property
    def values(self) -> int:
        """Values of a pair of units: slots and kernel."""
        slots = [axis.slots for axis in self.axes]
        return int(np.prod([*slots, *self.kernel]))

    def arrange(self, rows: Tensor) -> Tensor:
        """The tensor from values (pairs of units, values of a pair)."""
        count = len(self.axes)
        slots = [axis.slots for axis in self.axes]
        # (units..., slots..., kernel) -> units and slots of a dimension side by side
        split = rows.reshape(*self.units, *slots, *self.kernel)
        order = [i for d in range(count) for i in (d, count + d)]
        order += range(2 * count, split.dim())
        whole = split.permute(order).reshape(
            *(axis.units * axis.slots for axis in self.axes), *self.kernel
        )
        for dim, axis in enumerate(self.axes):
            whole = torch.empty_like(whole).index_copy(dim, axis.order.to(rows.device), whole)
        return whole


def kept_units(group: ChannelGroup, width: float) -> int:
    """Units that a group keeps at a width: at least one."""
    return max(1, round(group.units * width))


def last_units(groups: Sequence[ChannelGroup], width: float) -> dict[ChannelGroup, list[int]]:
    """The units that go at a width: the last ones."""
    return {group: list(range(kept_units(group, width), group.units)) for group in groups}


def layouts(
    program: Program, groups: Sequence[ChannelGroup], names: Sequence[str], width: float
) -> dict[str, Layout]:
    """Layouts of tensors at a width, by name."""
    kept = kept_positions(program, last_units(groups, width))
    found = {}
    for name in names:
        shape, where = program.state[name].shape, kept.get(name, {})
        axes = tuple(
            _axis(name, dim, shape[dim], groups, width, where.get(dim))
            for dim in range(min(2, len(shape)))
        )
        found[name] = Layout(axes, tuple(shape[2:]), where)
    return found


def _axis(
    name: str,
    dim: int,
    size: int,
    groups: Sequence[ChannelGroup],
    width: float,
    kept: Tensor | None,
) -> Axis:
    """An axis; one that is not all of one group has every position as a unit."""
    left = np.arange(size) if kept is None else kept.numpy()
    for group in groups:
        for member in group.members:
            if (member.parameter, member.dim) != (name, dim):
                continue
            if member.slices * group.units == size:
                units = kept_units(group, width)
                own = [group.slices(unit)[name, dim] for unit in range(units)]
                order = torch.from_numpy(np.searchsorted(left, np.concatenate(own)))
                return Axis(units, member.slices, order)
    return Axis(len(left), 1, torch.arange(len(left)))
