"""One canonical graph form for passes, made right after tracing.

Assertions and no-ops are gone, in-place calls are functional, views are reshapes, convolutions
and batch norms have one spelling, and dropout is out (remembered for training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.canonical.complex_pairs import split_complex
from graphwright.ir.canonical.functional import make_functional
from graphwright.ir.canonical.respell import respell
from graphwright.ir.edit import Editor, gw_meta, set_gw_meta
from graphwright.ir.mode import DROPOUTS
from graphwright.ir.program import Program

ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}

VIEWS = {
    "view", "reshape", "expand", "expand_as", "transpose", "permute", "t", "select", "slice",
    "squeeze", "unsqueeze", "chunk", "split", "split_with_sizes", "unbind", "narrow", "diagonal",
    "alias", "detach", "view_as", "flatten", "unflatten", "contiguous", "to", "unfold", "T", "mT",
    "movedim", "swapaxes", "real", "imag", "getitem",
}  # fmt: skip
"""Ops whose result may share memory with an operand."""


def canonicalize(program: Program) -> Program:
    """The program in canonical form. Computes the same function."""
    editor = Editor(program, by="trace")
    editor.changed = True
    _erase_assertions(editor)
    lost = make_functional(editor)
    split_complex(editor)
    respell(editor)
    take_out_dropout(editor)
    if lost:
        editor.facts.setdefault("trace", {})["updates_dropped"] = lost
    return editor.finish()


def op_name(node: fx.Node) -> str:
    """Base name of an ATen call, as `linear`; empty for anything that is not an operator."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", "") if node.op == "call_function" else ""


def _erase_assertions(editor: Editor) -> None:
    for node in reversed(list(editor.graph.nodes)):
        if op_name(node) in ASSERTIONS and not node.users:
            editor.erase(node)


def take_out_dropout(editor: Editor) -> None:
    """Removes dropout; the node it followed remembers kind, probability and who read the result."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUTS.values():
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        entry: list[Any] = [op_name(node), p]
        if len(source.users) > 1:
            entry.append([user.name for user in node.users])
        if node.users:
            set_gw_meta(source, dropout=[*(gw_meta(source).get("dropout") or ()), entry])
        editor.replace(node, source)
