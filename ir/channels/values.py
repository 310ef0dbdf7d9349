"""The ids that the dimensions of one tensor carry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from graphwright.ir.channels.classes import Ids


@dataclass(frozen=True, eq=False)
class Factor:
    """Ids over one dimension, or jointly over several (a channel dim split by a view).

    Attributes:
        dims: tensor dimensions, ascending.
        ids: one id per combination of positions, in the shape of these dimensions.
        zero: a removed position holds exact zeros in this tensor.
    """

    dims: tuple[int, ...]
    ids: Ids
    zero: bool


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor's sizes and factors; a dimension in no factor never changes its extent."""

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()

    def at(self, dim: int) -> Factor | None:
        """The factor that covers a dimension."""
        return next((f for f in self.factors if dim in f.dims), None)

    def swap(self, old: Factor, *new: Factor) -> Value:
        """The value with one factor replaced by others."""
        kept = (f for f in self.factors if f is not old)
        return Value(self.shape, (*kept, *new))

    def flags(self, zero: bool) -> Value:
        """The value with `zero` cleared everywhere unless `zero` is true."""
        if zero:
            return self
        return Value(self.shape, tuple(replace(f, zero=False) for f in self.factors))


Result = Value | list["Value | None"] | None
"""The product of a node: a tensor, several, or something that is no tensor."""


def factor(dims: Iterable[int], ids: Ids, zero: bool) -> Factor:
    """A factor whose dimensions may come in any order; the axes of `ids` follow `dims`."""
    order = tuple(dims)
    ranked = sorted(range(len(order)), key=lambda axis: order[axis])
    return Factor(tuple(order[axis] for axis in ranked), ids.transpose(ranked), zero)
