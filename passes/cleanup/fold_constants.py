"""cleanup.fold_constants: compute once what no input reaches."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_nodes, constant_value, is_static
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.program import Program
from graphwright.ir.stored.parametrized import PLAIN_MOVES
from graphwright.passes.base import Action, Context, Options, Pass, Result
from graphwright.passes.cleanup.eliminate_common_subexpressions import is_repeatable


class FoldConstantsOptions(Options):
    """Options of cleanup.fold_constants."""

    max_growth_mb: Annotated[float, Field(ge=0)] = 16.0
    """Most that one folded tensor may add to the stored size beyond what it replaces, in MB."""

    parameters: bool = True
    """Also fold chains that start at parameters (weight norm, standardised weights); the parts
    can then no longer be trained."""


class FoldConstants(Pass[FoldConstantsOptions]):
    """Replaces every subgraph that depends on no input by the tensor it computes.

    Left alone, each with its reason: calls that draw random numbers, results that would grow the
    file by more than `max_growth_mb`, compressed weights (folding `graphwright::*` would put the
    dense weight back), and plain moves of a stored tensor (a transposed weight), which would
    break ties and copy it.
    """

    contract = "exact"

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        constant = _constant_nodes(editor, self.options.parameters)
        edge = [n for n in editor.graph.nodes if n in constant and _is_edge(n, constant)]
        actions = [self._fold(editor, node, constant) for node in edge]
        return Result(editor.finish(), tuple(a for a in actions if a is not None))

    def _fold(self, editor: Editor, node: fx.Node, constant: set[fx.Node]) -> Action | None:
        chain = _chain(node, constant)
        stored = [n for n in chain if n.op == "get_attr"]
        calls = [n for n in chain if n.op == "call_function"]
        if stored and all(op_name(n) in PLAIN_MOVES for n in calls):
            return None
        value = node.meta["val"]
        freed = sum(_bytes(n.meta["val"]) for n in stored if set(n.users) <= set(calls))
        growth = (_bytes(value) - freed) / 1e6
        if growth > self.options.max_growth_mb:
            return Action.left(node.name, f"folding would add {growth:.1f} MB", "kept")
        result = constant_value(editor, node)
        name = editor.add_state(f"folded.{node.name}", result.contiguous().clone())
        editor.replace(node, editor.get(name))
        return Action(node.name, f"folded {len(calls)} calls")


def _constant_nodes(editor: Editor, parameters: bool) -> set[fx.Node]:
    def admits(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return parameters or not isinstance(editor.tensor(node), torch.nn.Parameter)
        return is_repeatable(node) and not _is_ours(node) and is_static(node)

    return constant_nodes(editor.graph, admits)


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "graphwright"


def _is_edge(node: fx.Node, constant: set[fx.Node]) -> bool:
    """A call whose result leaves the constant part of the graph."""
    return node.op == "call_function" and any(user not in constant for user in node.users)


def _chain(node: fx.Node, constant: set[fx.Node]) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return seen & constant


def _bytes(value: torch.Tensor) -> int:
    return int(value.numel()) * value.element_size()
