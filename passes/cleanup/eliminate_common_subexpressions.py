"""cleanup.eliminate_common_subexpressions: compute equal things once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.aliasing import unstable_nodes
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class EliminateCommonSubexpressions(Pass):
    """Merges calls that have the same operator and the same operands.

    Left alone: calls that write to an operand, calls on tensors that are written to, and calls
    that draw random numbers (two dropouts with equal arguments are two different masks).
    """

    contract = "exact"
    tolerance = 0.0

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        unstable = unstable_nodes(editor.graph)
        first: dict[Any, fx.Node] = {}
        merged = 0
        for node in list(editor.graph.nodes):
            if node.op not in ("call_function", "get_attr") or not is_repeatable(node):
                continue
            if node in unstable:
                continue
            key = _key(node)
            twin = first.setdefault(key, node)
            if twin is not node:
                editor.replace(node, twin)
                merged += 1
        return Result(editor.finish(), (Action("graph", f"{merged} calls merged"),))


def is_repeatable(node: fx.Node) -> bool:
    """True when calling it again with equal operands gives an equal result and no side effect."""
    target: Any = node.target
    if node.op == "get_attr" or not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _key(node: fx.Node) -> Any:
    return node.op, node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Any:
    """A hashable stand-in that keeps 1, 1.0 and True apart."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
