"""A call of the graph as rules read it: its arguments by name, tensors as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from graphwright.ir.channels.values import Value
from graphwright.ir.graph.nodes import arguments, op_name

if TYPE_CHECKING:
    from graphwright.ir.channels.walk import Walk


class Call:
    """A call's arguments by name, tensors as values."""

    def __init__(self, walk: Walk, node: fx.Node) -> None:
        self.node, self.name = node, op_name(node)
        self.shape = walk.shape(node.meta.get("val")) or ()
        self._walk = walk
        self.raw = arguments(node)

    def __getitem__(self, name: str) -> Any:
        """Value of a tensor argument, list of values, or the plain argument."""
        return self._walk.lift(self.raw[name])

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if self.raw.get(name) is not None else default

    def tensors(self) -> list[Value]:
        """Every tensor operand."""
        found = (self._walk.values.get(n.name) for n in self.node.all_input_nodes)
        return [v for v in found if isinstance(v, Value)]

    @property
    def first(self) -> Value:
        """The first argument, a tensor."""
        value = self[next(iter(self.raw))]
        if not isinstance(value, Value):
            raise UnknownCallError
        return value

    def dims(self, name: str = "dim") -> tuple[int, ...]:
        """A dimension argument as a tuple of non-negative ints; all dimensions when absent."""
        rank = len(self.first.shape)
        given = self.raw.get(name)
        if given is None or (isinstance(given, list | tuple) and not given):
            return tuple(range(rank))
        many = given if isinstance(given, list | tuple) else (given,)
        return tuple(int(d) % max(rank, 1) for d in many)


class UnknownCallError(Exception):
    """A call of a form that no rule covers."""
