"""Proves that an exact pass left the function alone, where that can be seen: in float64.

Deep nets lose digits: float32 moves the outputs of some by 1e-4 of their size, whatever a pass
does. So the two programs are run in float64 side by side, node by node. Where a node of the
earlier program is still there and its value agrees, the later program goes on from the earlier
one's value: what the next stretch loses is then its own, and never the sum over a deep net.

Equal means: within the pass's tolerance (1e-9). A stretch for which the pass stored new tensors
is allowed more, since these were rounded: a small multiple of what the earlier program itself
loses in its own precision on the very same stretch, from the very same values. Every slice of a
value is judged as well as the whole: a small part that is wrong must not hide beside a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.check.fidelity import Fidelity, compare, leaves
from graphwright.ir.check.precision import Walk, own_precision, roundoff
from graphwright.ir.check.slices import FAR, is_astray, slice_errors
from graphwright.ir.graph.aliasing import unstable_nodes
from graphwright.ir.program import Program

SMALL_MULTIPLE = 8.0
"""Multiple of the loss of a program's own precision that counts as rounding."""

OWN_OPS = "graphwright."
"""Ops of our own; some of them compute in float32, whatever they are given."""


@dataclass(frozen=True)
class Disagreement:
    """A node of the later program whose value is not the earlier program's.

    Attributes:
        node: the node of the later program.
        rewritten: nodes that the pass wrote between it and the last values that agree; the fault
            is in one of them. Empty where the node itself is all that there is.
        error: distance from the earlier program's value, in float64.
        allowed: the relative error that rounding explains.
        worst: the relative error of the value, or of a slice of it where that is what is wrong.
    """

    node: fx.Node
    rewritten: tuple[fx.Node, ...]
    error: Fidelity
    allowed: float
    worst: float


def disagreements(
    before: Program, after: Program, inputs: tuple[Tensor, ...], tolerance: float
) -> list[Disagreement]:
    """Nodes at which `after` is not `before` up to rounding, and that an output depends on.

    Args:
        before: the earlier program; both have the same inputs and the same number of outputs.
        after: the later one. A node that both have is the same op, of one name, on the same
            stored tensors; all others of the later program are rewritten.
        inputs: one tensor per input.
        tolerance: relative error in float64 that counts as equal.

    Returns:
        empty where every output agrees; else in graph order, from the first node that differs.
    """
    return _SideBySide(before, after, inputs, tolerance).run()


class _SideBySide:
    def __init__(
        self, before: Program, after: Program, inputs: tuple[Tensor, ...], tolerance: float
    ) -> None:
        self.tolerance = tolerance
        self.unit = roundoff(before)
        self.old = Walk(before, inputs, wide=True)
        self.own = Walk(before, inputs, wide=False)  # from the same values, as the program runs
        self.new = Walk(after, inputs, wide=True)
        self.queue: Iterator[fx.Node] = iter(before.graph.nodes)
        calls = {n.name: n for n in before.graph.nodes if n.op == "call_function"}
        self.partner: dict[fx.Node, fx.Node] = {
            n: calls[n.name]
            for n in after.graph.nodes
            if n.name in calls and _is_kept(n, calls[n.name], after, before)
        }
        self.paired = set(self.partner.values())
        for walk in (self.old, self.own):
            walk.hold(self.paired)
        self.unstable = unstable_nodes(after.graph)
        known = {id(tensor) for tensor in before.state.values()}
        self.rounded = {
            n for n in after.graph.nodes
            if n.op == "get_attr" and id(after.state[str(n.target)]) not in known
        }  # fmt: skip
        self.agreed: set[fx.Node] = set()
        self.differing: dict[fx.Node, Disagreement] = {}

    def run(self) -> list[Disagreement]:
        for node in self.new.program.graph.nodes:
            if node.op == "output":
                return self._outputs(node)
            self.new.step(node)
            if node.op == "call_function":
                self._mark(node)
            if node in self.partner:
                self._meet(node, self.partner[node])
            self.new.release(node)
        raise AssertionError("a graph ends with its output")

    def _mark(self, node: fx.Node) -> None:
        """Notes whether a new stored tensor or number, or a fused op, went into a value."""
        written = node not in self.partner and (
            _has_fractions((node.args, node.kwargs)) or str(node.target).startswith(OWN_OPS)
        )
        read = any(operand in self.rounded for operand in node.all_input_nodes)
        if written or read or node in self.new.narrow:
            self.rounded.add(node)

    def _meet(self, node: fx.Node, partner: fx.Node) -> None:
        self._advance(partner)
        expected, got = self.old.value(partner), self.new.value(node)
        lost = self.own.value(partner)
        found = self._judge(node, expected, got, lost)
        if found is None or self._same_operands(node, partner):
            self._go_on_from(node, partner)
        else:
            self.differing[node] = found
        for walk in (self.old, self.own):
            walk.release(partner)
            walk.let_go(partner)

    def _advance(self, until: fx.Node | None) -> None:
        """Runs the earlier program up to a node; it stays readable until it is released."""
        while until is None or until not in self.old.values:
            node = next(self.queue)
            if node.op == "output":
                return
            for walk in (self.old, self.own):
                walk.step(node)
                if node not in self.paired:
                    walk.release(node)

    def _go_on_from(self, node: fx.Node, partner: fx.Node) -> None:
        if node in self.unstable:
            return
        expected = self.old.value(partner)
        self.agreed.add(node)
        self.rounded.discard(node)
        self.new.values[node] = expected
        self.own.values[partner] = own_precision(expected, self.own.values[partner])

    def _judge(self, node: fx.Node, expected: Any, got: Any, lost: Any) -> Disagreement | None:
        if _equal(expected, got):
            return None
        error = compare(expected, got)
        if error.blank:
            return None
        loss = compare(expected, lost).relative
        # What float64 itself loses, by what the shorter type does.
        allowed = max(self.tolerance, SMALL_MULTIPLE * loss * 2**-52 / self.unit)
        if node in self.rounded:
            allowed = max(allowed, SMALL_MULTIPLE * max(loss, self.unit / 2))
        if not error.within(allowed):
            return Disagreement(node, self._rewritten(node), error, allowed, error.relative)
        if self._has_astray(node, expected, got, lost):
            worst = float(slice_errors(expected, got).max())
            return Disagreement(node, self._rewritten(node), error, allowed, worst)
        return None

    def _has_astray(self, node: fx.Node, expected: Any, got: Any, lost: Any) -> bool:
        """Whether a part of a value is wrong that is too small to show in the whole of it."""
        if node in self.rounded:
            return is_astray(expected, lost, got, max(self.tolerance, FAR * self.unit))
        losses = FAR * 2**-52 / self.unit * slice_errors(expected, lost)
        allowed = torch.clamp(losses, min=self.tolerance)
        return bool((slice_errors(expected, got) > allowed).any())

    def _rewritten(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes of the pass's own that lead to `node`, the nearest first."""
        found: list[fx.Node] = []
        stack = [node]
        while stack:
            for operand in stack.pop(0).all_input_nodes:
                new = operand.op == "call_function" and operand not in self.partner
                if new and operand not in found:
                    found.append(operand)
                    stack.append(operand)
        own = (node,) if node.op == "call_function" and node not in self.partner else ()
        return (*own, *found)

    def _same_operands(self, node: fx.Node, partner: fx.Node) -> bool:
        """Whether both are one op on equal operands.

        Ops that jump (rounding to codes, comparing, sorting) can then still give values a whole
        step apart; such a step is nobody's fault.
        """
        if node.target is not partner.target:
            return False
        new, old = _flat((node.args, node.kwargs)), _flat((partner.args, partner.kwargs))
        if len(new) != len(old):
            return False
        for a, b in zip(new, old, strict=True):
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                if a != b:
                    return False
            elif self._judge(a, self.old.value(b), self.new.value(a), self.own.value(b)):
                return False
        return True

    def _outputs(self, output: fx.Node) -> list[Disagreement]:
        self._advance(None)
        last = next(iter(reversed(self.old.program.graph.nodes)))
        failing = []
        for node, partner in zip(_flat(output.args), _flat(last.args), strict=True):
            if isinstance(node, fx.Node) and isinstance(partner, fx.Node):
                values = self.old.value(partner), self.new.value(node), self.own.value(partner)
                found = self._judge(node, *values)
                if found is not None and node not in self.agreed:
                    self.differing.setdefault(node, found)
                    failing.append(node)
        return self._behind(failing)

    def _behind(self, failing: list[fx.Node]) -> list[Disagreement]:
        """Differing nodes that a failing output depends on, over nodes that agree nowhere."""
        seen: set[fx.Node] = set()
        while failing:
            node = failing.pop()
            if node not in seen and node not in self.agreed:
                seen.add(node)
                failing.extend(node.all_input_nodes)
        order = [n for n in self.new.program.graph.nodes if n in seen]
        return [self.differing[n] for n in order if n in self.differing]


def _equal(a: Any, b: Any) -> bool:
    left, right = list(leaves(a)), list(leaves(b))
    return len(left) == len(right) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
        for (_, x), (_, y) in zip(left, right, strict=True)
    )


def _is_kept(node: fx.Node, old: fx.Node, after: Program, before: Program) -> bool:
    if node.op != "call_function" or node.target is not old.target:
        return False
    stored = [after.state[str(n.target)] for n in node.all_input_nodes if n.op == "get_attr"]
    theirs = [before.state[str(n.target)] for n in old.all_input_nodes if n.op == "get_attr"]
    return [id(t) for t in stored] == [id(t) for t in theirs]


def _flat(arguments: Any) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    fx.node.map_aggregate(arguments, note)
    return found


def _has_fractions(arguments: Any) -> bool:
    """Whether there is a number that a pass may have rounded: a float that is not whole."""
    return any(isinstance(a, float) and not a.is_integer() for a in _flat(arguments))
