"""The first node at which two programs part, and what a message says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.check.fidelity import Fidelity, compare
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.program import Program

MOST_NAMED = 4
"""Further nodes that a message names."""


@dataclass(frozen=True)
class Difference:
    """The first node at which two programs compute different values.

    Attributes:
        node: name of the node in the later program.
        op: what it calls.
        scope: module it belongs to.
        by: pass that made it (`trace` when it was there from the start).
        error: how far its value is from the earlier program's.
        allowed: relative error that rounding explains at this node.
        others: further nodes that the pass wrote, in which the fault may lie as well.
    """

    node: str
    op: str
    scope: str
    by: str
    error: Fidelity
    allowed: float
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f" in {self.scope}" if self.scope else ""
        if self.others:
            place += f" (or {', '.join(self.others[:MOST_NAMED])})"
        return (
            f"{self.node} ({self.op}){place}, made by {self.by}: {self.error}; "
            f"allowed {self.allowed:.3g}"
        )


def first_difference(
    before: Program,
    after: Program,
    bound: float,
    inputs: tuple[torch.Tensor, ...] | None = None,
) -> Difference | None:
    """First node of `after`, in graph order, that parts from `before` by more than `bound`.

    Both graphs are run once on the same inputs, in the program's own precision. Nodes correspond
    when they carry the same name (edits keep the names of nodes they do not replace); a replaced
    node is judged by the first node behind it that has a counterpart, and the answer then names
    the new node among that node's operands, which is where the fault lies.
    """
    inputs = before.examples if inputs is None else inputs
    reference = _Recorder(before).values(inputs)
    actual = _Recorder(after).values(inputs)
    pairs = [(node, node.name) for node in after.graph.nodes if node.name in reference]
    # an output that a pass wrote has no counterpart by name, and still has one by its place
    pairs += [(new, old.name) for old, new in zip(_outputs(before), _outputs(after), strict=True)]
    for node, name in pairs:
        if node.name not in actual or name not in reference:
            continue
        error = compare(reference[name], actual[node.name])
        if not error.within(bound):
            return difference(_newest(node, reference), error, bound)
    return None


def _outputs(program: Program) -> list[fx.Node]:
    returned = program.graph.output_node().args[0]
    assert isinstance(returned, tuple)
    return [node for node in returned if isinstance(node, fx.Node)]


def difference(
    node: fx.Node, error: Fidelity, allowed: float, others: tuple[fx.Node, ...] = ()
) -> Difference:
    """The words of a message about a node that differs."""
    scope = next(reversed(node.meta.get("nn_module_stack", {})), "")
    by = gw_meta(node).get("by", "trace")
    names = tuple(other.name for other in others)
    return Difference(node.name, str(node.target), scope, by, error, allowed, names)


def _newest(node: fx.Node, reference: dict[str, Any]) -> fx.Node:
    """Among a differing node and the new nodes feeding it, the one nearest to the node."""
    if node.name not in reference:
        return node
    for operand in node.all_input_nodes:
        if operand.name not in reference and operand.op == "call_function":
            return operand
    return node


class _Recorder(fx.Interpreter):
    """Runs a program and keeps every tensor it computes, by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.program = program
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function":
            self.kept[n.name] = value
        return value

    def values(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
        with torch.no_grad():
            self.run(*self.program.filled(inputs))
        return self.kept
