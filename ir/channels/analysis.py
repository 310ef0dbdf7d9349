"""The channel analysis of a program: values with final classes, pins with reasons, groups."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from graphwright.ir.channels.classes import Ids
from graphwright.ir.channels.groups import ChannelGroup, build_groups
from graphwright.ir.channels.rules import (  # noqa: F401  rules register themselves
    elementwise,
    index,
    layers,
    quantized,
    reduce,
    scan,
    shape,
)
from graphwright.ir.channels.values import Factor, Result, Value
from graphwright.ir.channels.walk import Norm, Unit, Walk
from graphwright.ir.channels.weights import is_weight
from graphwright.ir.graph.cost import cost
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.layers.kinds import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from graphwright.ir.program import Program

PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "linear": 0}
ATTENTIONS = ("scaled_dot_product_attention", "attention")
"""Names of the calls that are an attention as a whole, ATen's and ours."""

SPLIT = "positions of a split dimension that must go together"


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates of a call that shrink in proportion to what is kept of `classes`."""

    macs: float
    classes: tuple[Ids, ...]


@dataclass(frozen=True, eq=False)
class Analysis:
    """The findings of the walk, with equalities resolved.

    Attributes:
        program: the program that was walked, parameter-only subgraphs folded.
        unit, norm: options.
        values: node name to its factors, as the walk left them.
        stored: (state name, dimension) to the class of each position; tied names once.
        class_of: id to class.
        pinned: by class.
        unknown: node name to the operator no rule covers.
    """

    program: Program
    unit: Unit
    norm: Norm
    values: dict[str, Result]
    stored: dict[tuple[str, int], Ids]
    owners: dict[str, str]
    class_of: Ids
    pinned: np.ndarray
    reasons: dict[int, str]
    unknown: dict[str, str]

    @property
    def count(self) -> int:
        """Upper bound of class numbers."""
        return len(self.pinned)

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of the stored tensors that hold weights: parameters, and codes of quantized."""
        return frozenset(name for name in self.owners if is_weight(self.program, name))

    @cached_property
    def groups(self) -> list[ChannelGroup]:
        """All groups, prunable or not."""
        return build_groups(self)

    def reason(self, classes: Ids) -> str:
        """The reason for pinned classes: the first cause of the first of them."""
        return next((self.reasons[int(c)] for c in classes if int(c) in self.reasons), "pinned")

    @cached_property
    def terms(self) -> list[Term]:
        """Every multiply-accumulate of the program, by what it is proportional to."""
        nodes = {n.name: n for n in self.program.graph.nodes}
        found: list[Term] = []
        for layer in cost(self.program).layers:
            if layer.macs:
                found.extend(self._terms_of(nodes[layer.node], float(layer.macs)))
        return found

    def _terms_of(self, node: fx.Node, macs: float) -> Iterator[Term]:
        name, operands = op_name(node), [self._value(a) for a in node.args]
        out = self._value(node)
        if out is None:  # several results: recurrent layers, of which nothing is removed
            yield Term(macs, ())
            return
        if name in ATTENTIONS:
            query, value = operands[0], operands[2]
            assert query is not None
            assert value is not None
            wide = query.shape[-1] / (query.shape[-1] + value.shape[-1])
            yield Term(macs * wide, self._resolved(query.factors))
            yield Term(macs * (1 - wide), self._resolved(out.factors))
            return
        summed: list[Factor] = []
        if name in CONVOLUTIONS and operands[1] is not None:
            summed = [f for f in operands[1].factors if 1 in f.dims]
        elif (
            name in TRANSPOSED_CONVOLUTIONS and operands[0] is not None and operands[1] is not None
        ):
            weight = [f for f in operands[1].factors if 1 in f.dims]
            yield Term(macs, self._resolved([*operands[0].factors, *weight]))
            return
        elif name in PRODUCTS and (left := operands[PRODUCTS[name]]) is not None:
            last = left.at(len(left.shape) - 1)
            summed = [last] if last is not None else []
        yield Term(macs, self._resolved([*out.factors, *summed]))

    def _value(self, argument: object) -> Value | None:
        found = self.values.get(argument.name) if isinstance(argument, fx.Node) else None
        return found if isinstance(found, Value) else None

    def _resolved(self, factors: Iterable[Factor]) -> tuple[Ids, ...]:
        return tuple(self.class_of[f.ids].ravel() for f in factors)

    def macs_per_class(self) -> np.ndarray:
        """Multiply-accumulates that go when one class alone is removed."""
        total = np.zeros(self.count)
        for term in self.terms:
            if not term.classes:
                continue
            classes = np.unique(np.concatenate(term.classes))
            kept = np.ones(len(classes))
            for ids in term.classes:
                counts = np.bincount(np.searchsorted(classes, ids), minlength=len(classes))
                kept *= 1 - counts / len(ids)
            total[classes] += term.macs * (1 - kept)
        return total

    def macs(self, removed: np.ndarray) -> float:
        """Multiply-accumulates that are left.

        Args:
            removed: flag per class.
        """
        return sum(
            term.macs * float(np.prod([1 - removed[ids].mean() for ids in term.classes]))
            for term in self.terms
        )

    def parameters(self, removed: np.ndarray) -> int:
        """Parameter values (codes of quantized ones too) that are left; tied tensors once."""
        total = 0
        for name in dict.fromkeys(name for name, _ in self.stored):
            tensor = self.program.state[name]
            if name in self.weights:
                kept = [int((~removed[self.stored[name, d]]).sum()) for d in range(tensor.dim())]
                total += int(np.prod(kept))
        return total


def analyse(program: Program, unit: Unit, norm: Norm) -> Analysis:
    """Walks a folded program and resolves what was recorded."""
    walk = Walk(program, unit, norm)
    walk.run()
    _close(walk)
    class_of = walk.classes.free_components()
    pinned = np.zeros(int(class_of.max(initial=0)) + 1, bool)
    reasons: dict[int, str] = {}
    for pin in walk.classes.pins:
        for c in np.unique(class_of[pin.ids]).tolist():
            reasons.setdefault(c, f"{pin.node}: {pin.text}")
            pinned[c] = True
    pinned[class_of[0]] = True
    if walk.unknown:
        names = ", ".join(f"{op} at {node}" for node, op in list(walk.unknown.items())[:5])
        more = f" and {len(walk.unknown) - 5} more" if len(walk.unknown) > 5 else ""
        warnings.warn(
            f"channels that reach these operators are kept, no rule covers them: {names}{more}",
            stacklevel=3,
        )
    stored, owners = _stored(walk, class_of)
    return Analysis(program, unit, norm, walk.values, stored, owners, class_of, pinned, reasons,
                    walk.unknown)  # fmt: skip


def _close(walk: Walk) -> None:
    """Makes every joint factor vary along one axis only, or its view would mean something else.

    One array at a time, with classes looked up anew: closing two by one stale labelling merges
    far too much.
    """
    seen: set[int] = set()
    for node, result in walk.values.items():
        parts = result if isinstance(result, list) else [result]
        for value in parts:
            if not isinstance(value, Value):
                continue
            for f in value.factors:
                if len(f.dims) > 1 and id(f.ids) not in seen:
                    seen.add(id(f.ids))
                    walk.node = node
                    rest = walk.release(f.dims, f.ids, f.zero)
                    if rest is not None and len(rest.dims) > 1:
                        # nothing used a dimension alone (a shuffle): the longest has most units
                        longest = max(rest.dims, key=lambda d: value.shape[d])
                        others = [d for d in rest.dims if d != longest]
                        walk.fix_all(Value(value.shape, (rest,)), others, SPLIT)


def _stored(walk: Walk, class_of: Ids) -> tuple[dict[tuple[str, int], Ids], dict[str, str]]:
    """Classes of every dimension of every stored tensor, under its first name."""
    owner: dict[int, str] = {}
    stored: dict[tuple[str, int], Ids] = {}
    owners: dict[str, str] = {}
    for name, value in walk.state.items():
        owners[name] = owner.setdefault(id(value), name)
        if owners[name] != name:
            continue
        for d, size in enumerate(value.shape):
            f = value.at(d)
            ids = np.zeros(size, np.int64) if f is None else f.ids
            stored[name, d] = class_of[ids]
    return stored, owners
