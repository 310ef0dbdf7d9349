"""Folds what stands between stored tensors and channels: reparametrisations and constant tables."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.ir.channels.walk import RULES
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_nodes, constant_value, is_static
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.program import Program

NORMALISING = {
    "_weight_norm", "_weight_norm_interface", "batch_norm", "group_norm", "layer_norm", "mean",
    "sum", "var", "std", "var_mean", "norm", "linalg_vector_norm", "mv", "vdot", "dot", "matmul",
    "mm", "softmax", "div",
}  # fmt: skip
"""Operators that mix the channels of a parameter (weight norm, standardised weights)."""

MOVES = {"reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "to", "slice",
         "select", "flatten", "unflatten"}  # fmt: skip
RANDOM = {"rand", "randn", "randint", "bernoulli", "dropout", "randn_like", "rand_like"}


def fold(program: Program) -> Program:
    """Computes constant subgraphs that would hide channels; the same object if there are none.

    A subgraph of buffers and constants alone is folded whenever it computes something. One with
    parameters is folded only when it normalises them or holds an unknown operator: a transposed
    or scaled weight stays, so that ties are kept and both parts can be trained.
    """
    constant = _constant_nodes(program)
    if not any(n.op == "call_function" for n in constant):
        return program
    editor = Editor(program, by="channels")
    twin = {n.name: n for n in editor.graph.nodes}
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node in constant and _is_edge(node, constant):
            chain = _chain(node)
            if _worth_folding(chain, program):
                _fold(editor, twin[node.name], chain)
    return editor.finish()


def _constant_nodes(program: Program) -> set[fx.Node]:
    def admits(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) in program.state
        fits = op_name(node) not in RANDOM and getattr(node.target, "namespace", "") == "aten"
        return fits and is_static(node)

    return constant_nodes(program.graph, admits)


def _is_edge(node: fx.Node, constant: set[fx.Node]) -> bool:
    return any(user not in constant for user in node.users)


def _chain(node: fx.Node) -> list[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return list(seen)


def _worth_folding(chain: list[fx.Node], program: Program) -> bool:
    stored = [program.state[str(n.target)] for n in chain if n.op == "get_attr"]
    names = {op_name(n) for n in chain if n.op == "call_function"}
    if not stored and names <= {"zeros", "ones", "full", "empty"}:
        return False  # made in the graph at any size
    if not any(isinstance(t, torch.nn.Parameter) for t in stored):
        return not names <= MOVES
    return bool(names & NORMALISING) or not names <= set(RULES)


def _fold(editor: Editor, node: fx.Node, chain: list[fx.Node]) -> None:
    trained = [n for n in chain if n.op == "get_attr" and _is_parameter(editor, n)]
    result = constant_value(editor, node).contiguous().clone()
    if trained and result.is_floating_point():
        result = torch.nn.Parameter(result)
    name = editor.add_state(f"folded.{node.name}_value", result)
    editor.replace(node, editor.get(name))


def _is_parameter(editor: Editor, node: fx.Node) -> bool:
    return isinstance(editor.state[str(node.target)], torch.nn.Parameter)
