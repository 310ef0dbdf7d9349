"""One canonical graph form for passes, made right after tracing.

Assertions and no-ops are gone, in-place calls are functional, views are reshapes, convolutions
and batch norms have one spelling, and dropout is out (remembered for training).
"""

from __future__ import annotations

from graphwright.ir.canonical.complex_pairs import split_complex
from graphwright.ir.canonical.functional import make_functional
from graphwright.ir.canonical.respell import respell
from graphwright.ir.canonical.sizes import divide_whole
from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.mode import take_out_dropout
from graphwright.ir.program import Program

ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}


def canonicalize(program: Program) -> Program:
    """The program in canonical form. Computes the same function."""
    editor = Editor(program, by="trace")
    editor.changed = True
    _erase_assertions(editor)
    divide_whole(editor)
    lost = make_functional(editor)
    split_complex(editor)
    respell(editor)
    take_out_dropout(editor)
    if lost:
        editor.facts.setdefault("trace", {})["updates_dropped"] = lost
    return editor.finish()


def _erase_assertions(editor: Editor) -> None:
    for node in reversed(list(editor.graph.nodes)):
        if op_name(node) in ASSERTIONS and not node.users:
            editor.erase(node)
