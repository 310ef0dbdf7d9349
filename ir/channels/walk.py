"""The walk over the graph: values of all nodes, and the steps that every operator rule uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import sympy
import torch
from torch import fx

from graphwright.ir.channels.calls import Call, UnknownCallError
from graphwright.ir.channels.classes import Classes, Ids
from graphwright.ir.channels.values import Factor, Result, Value, factor
from graphwright.ir.channels.weights import is_zeroed, only_added
from graphwright.ir.data.batches import example_sizes
from graphwright.ir.graph.aliasing import writes
from graphwright.ir.graph.nodes import arguments, op_name
from graphwright.ir.graph.sizes import dimension_names, named_symbol
from graphwright.ir.program import Program

Unit = Literal["head", "channel"]
Norm = Literal["exact", "pin"]
Labels = Sequence[Hashable | None]
Rule = Callable[["Walk", "Call"], Result]

__all__ = ["RULES", "Call", "Linked", "Norm", "Rule", "Unit", "UnknownCallError", "Walk",
           "arguments", "only_added", "rule"]  # fmt: skip

RULES: dict[str, Rule] = {}
"""Operator rules by base name, filled by the `rules_*` modules."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operators of these base names."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class Linked:
    """One factor that several operands share, by label.

    Attributes:
        labels: of its axes.
        ids: of the first operand that carries it.
        zero: operand position to its `zero`, for those that carry the factor.
    """

    labels: tuple[Hashable, ...]
    ids: Ids
    zero: dict[int, bool]


class Walk:
    """State of one analysis. Rules call the methods; every step records why it was needed."""

    def __init__(self, program: Program, unit: Unit, norm: Norm) -> None:
        self.program, self.unit, self.norm = program, unit, norm
        self.classes = Classes()
        self.values: dict[str, Result] = {}
        self.state: dict[str, Value] = {}
        self.unknown: dict[str, str] = {}
        self.node = ""
        self._owners: dict[Any, str] = {}

    # ---- sizes

    @cached_property
    def _sizes(self) -> dict[Any, sympy.Integer]:
        given = example_sizes(self.program.signature, self.program.examples)
        names = dimension_names(self.program)
        return {s: sympy.Integer(given[n.name]) for s, n in names.items() if n.name in given} | {
            named_symbol(n): sympy.Integer(v) for n, v in given.items()
        }

    def size(self, size: Any) -> int | None:
        """A size at the examples; None when it depends on data."""
        if isinstance(size, int):
            return size
        value = size.node.expr.xreplace(self._sizes)
        return int(value) if value.is_number else None

    def shape(self, value: Any) -> tuple[int, ...] | None:
        """Sizes of a recorded (fake) tensor at the examples; None when it is none, or unknown."""
        if not isinstance(value, torch.Tensor):
            return None
        sizes = [self.size(s) for s in value.shape]
        return None if None in sizes else tuple(s for s in sizes if s is not None)

    # ---- the graph

    def run(self) -> None:
        """Visits every node in order."""
        for node in self.program.graph.nodes:
            self.node = node.name
            self.values[node.name] = self._visit(node)

    def _visit(self, node: fx.Node) -> Result:
        if node.op == "placeholder":
            return self._fixed(node)
        if node.op == "get_attr":
            return self.stored(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                for value in _several(self.values[source.name]):
                    self.freeze(value, "an output of the program")
            return None
        return self._call(node)

    def _call(self, node: fx.Node) -> Result:
        if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            return None  # a size, or arithmetic on sizes
        handler = RULES.get(op_name(node))
        namespace = getattr(node.target, "namespace", "aten")
        if namespace not in ("aten", "graphwright"):
            handler = None
        written = writes(node)
        if handler is not None and not written and self._known_sizes(node):
            try:
                return handler(self, Call(self, node))
            except (UnknownCallError, LookupError, TypeError, ValueError, AttributeError):
                handler = None  # a form of the call that its rule does not know
        text = f"operator {node.target} has no channel rule"
        if written:
            text = f"operator {node.target} writes in place"
        elif handler is not None:
            text = f"sizes of {node.target} depend on the data"
        else:
            self.unknown[node.name] = str(node.target)
        for source in node.all_input_nodes:
            for value in _several(self.values[source.name]):
                self.freeze(value, text)
        return self._fixed(node)

    def _known_sizes(self, node: fx.Node) -> bool:
        """Whether the shapes of the results and the operands have values at the examples."""
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        parts = [p for v in values for p in (v if isinstance(v, list | tuple) else (v,))]
        return all(self.shape(p) is not None for p in parts if isinstance(p, torch.Tensor))

    def _fixed(self, node: fx.Node) -> Result:
        """No factors; None for what has no shape at the examples."""
        value = node.meta.get("val")
        parts = list(value) if isinstance(value, list | tuple) else [value]
        shapes = [self.shape(part) for part in parts]
        found = [None if shape is None else Value(shape) for shape in shapes]
        return found if isinstance(value, list | tuple) else found[0]

    def stored(self, node: fx.Node) -> Value | None:
        """The value of a stored tensor: an id for every position of every dimension."""
        name = str(node.target)
        tensor = self.program.state.get(name)
        if tensor is None:
            return None
        if name not in self.state:
            owner = self._owners.setdefault(_identity(tensor), name)
            if owner != name:
                self.state[name] = self.state[owner]
            else:
                zero = is_zeroed(self.program, name)
                factors = tuple(
                    Factor((d,), self.classes.fresh(s), zero) for d, s in enumerate(tensor.shape)
                )
                self.state[name] = self.tidy(Value(tuple(tensor.shape), factors))
        return self.state[name]

    def lift(self, argument: Any) -> Any:
        """An argument with nodes replaced by their values (nodes that are no tensors stay)."""
        if isinstance(argument, fx.Node):
            value = self.values.get(argument.name)
            return argument if value is None else value
        if isinstance(argument, list | tuple):
            return [self.lift(part) for part in argument]
        return argument

    # ---- steps

    def tidy(self, value: Value) -> Value:
        """Drops axes of size 1 from factors, and factors whose ids are all pins."""
        for f in value.factors:
            ones = tuple(axis for axis, d in enumerate(f.dims) if value.shape[d] == 1)
            if len(ones) == len(f.dims):
                self.classes.pin(f.ids, self.node, "a dimension of size 1")
                value = value.swap(f)
            elif ones:
                dims = tuple(d for d in f.dims if value.shape[d] != 1)
                value = value.swap(f, Factor(dims, f.ids.squeeze(ones), f.zero))
            elif not f.ids.any():
                value = value.swap(f)
        return value

    def value(self, shape: Sequence[int], factors: Iterable[Factor]) -> Value:
        """A tidy value."""
        return self.tidy(Value(tuple(shape), tuple(factors)))

    def equal(self, a: Ids, b: Ids, text: str) -> None:
        """Records that two arrays of ids are equal."""
        self.classes.equal(a, b, self.node, text)

    def fix(self, value: Value, dim: int, text: str) -> Value:
        """The extent of `dim` may not change: pins it, or makes a joint factor equal along it."""
        f = value.at(dim)
        if f is None:
            return value
        if len(f.dims) == 1:
            self.classes.pin(f.ids, self.node, text)
            return value.swap(f)
        axis = f.dims.index(dim)
        first: Ids = np.take(f.ids, 0, axis=axis)
        self.equal(f.ids, np.expand_dims(first, axis), text)
        rest = tuple(d for d in f.dims if d != dim)
        return value.swap(f, Factor(rest, first, f.zero))

    def fix_all(self, value: Value, dims: Iterable[int], text: str) -> Value:
        """`fix` for several dimensions."""
        for dim in dims:
            value = self.fix(value, dim, text)
        return value

    def freeze(self, value: Value, text: str) -> None:
        """Pins a whole tensor."""
        for f in value.factors:
            self.classes.pin(f.ids, self.node, text)

    def separate(self, value: Value, f: Factor) -> Value:
        """Leaves a joint factor on one dimension: the outermost for heads, else the innermost."""
        carrier = f.dims[0] if self.unit == "head" else f.dims[-1]
        text = "positions of a split dimension that must go together"
        return self.fix_all(value, [d for d in f.dims if d != carrier], text)

    def alone(self, value: Value, dim: int) -> tuple[Value, Factor | None]:
        """Separates whatever joint factor covers `dim`; the factor left there, if any."""
        f = value.at(dim)
        if f is not None and len(f.dims) > 1:
            value = self.separate(value, f)
            f = value.at(dim)
        return value, f

    def link(
        self,
        values: Sequence[Value],
        labels: Sequence[Labels],
        alone: Collection[Hashable] = (),
        text: str = "meets a dimension that is fixed",
    ) -> list[Linked]:
        """Makes dimensions with the same label equal across operands.

        Args:
            values: operands.
            labels: a label per dimension; None for a dimension that must stay as it is.
            alone: labels that a joint factor may not cover.
            text: reason for pins.
        """
        found = list(values)
        for i, names in enumerate(labels):
            fixed = [d for d, label in enumerate(names) if label is None]
            found[i] = self.fix_all(found[i], fixed, text)
        while True:
            before = [[f.dims for f in v.factors] for v in found]
            self._spread_fixed(found, labels, text)
            self._break_joints(found, labels, alone)
            if before == [[f.dims for f in v.factors] for v in found]:
                break
        table: dict[tuple[Hashable, ...], Linked] = {}
        for i, value in enumerate(found):
            for f in value.factors:
                key = tuple(labels[i][d] for d in f.dims)
                linked = table.setdefault(key, Linked(key, f.ids, {}))
                linked.zero[i] = f.zero
                self.equal(linked.ids, f.ids, text)
        return list(table.values())

    def _spread_fixed(self, values: list[Value], labels: Sequence[Labels], text: str) -> None:
        """A dimension that is fixed on one operand is fixed on all; size 1 is broadcast."""
        fixed = {
            label
            for value, names in zip(values, labels, strict=True)
            for d, label in enumerate(names)
            if value.shape[d] != 1 and value.at(d) is None
        }
        for i, names in enumerate(labels):
            for d, label in enumerate(names):
                if label in fixed:
                    values[i] = self.fix(values[i], d, text)

    def _break_joints(
        self, values: list[Value], labels: Sequence[Labels], alone: Collection[Hashable]
    ) -> None:
        """Separates a joint factor where another operand is structured differently."""
        keys = [tuple(labels[i][d] for d in f.dims) for i, v in enumerate(values)
                for f in v.factors]  # fmt: skip
        for i, value in enumerate(values):
            for f in value.factors:
                if len(f.dims) == 1:
                    continue
                mine = tuple(labels[i][d] for d in f.dims)
                clash = any(set(key) & set(mine) and key != mine for key in keys)
                if clash or set(mine) & set(alone):
                    values[i] = self.separate(values[i], f)

    def gather(
        self,
        shape: Sequence[int],
        out: Labels,
        linked: Iterable[Linked],
        zero: Callable[[Linked], bool],
    ) -> Value:
        """The result of a call: the linked factors whose labels are all among its dimensions."""
        place = {label: d for d, label in enumerate(out) if label is not None}
        factors = [
            factor([place[label] for label in link.labels], link.ids, zero(link))
            for link in linked
            if all(label in place for label in link.labels)
        ]
        return self.value(shape, factors)

    def release(self, dims: Sequence[int], ids: Ids, zero: bool) -> Factor | None:
        """A factor without the axes along which classes are constant; None when none is left."""
        classes = self.classes.find(ids)
        kept = list(dims)
        for axis in reversed(range(len(dims))):
            if (classes == np.take(classes, [0], axis)).all():
                first: Ids = np.take(ids, 0, axis=axis)
                ids, classes = first, np.take(classes, 0, axis=axis)
                del kept[axis]
        if kept:
            return Factor(tuple(kept), ids, zero)
        self.classes.pin(ids, self.node, "one unit spread over a whole dimension")
        return None


def _several(result: Result) -> list[Value]:
    parts = result if isinstance(result, list) else [result]
    return [part for part in parts if isinstance(part, Value)]


def _identity(tensor: torch.Tensor) -> Any:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
