"""What an adapter computes from stored tensors alone, computed once."""

from __future__ import annotations

from torch import Tensor, fx

from graphwright.ir.adapters.record import adapters, forget
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_nodes, constant_value
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.program import Program


def settled(program: Program, by: str) -> Program:
    """The program with such values stored: lengths of DoRA, spread slices, means of experts.

    Weights in codes stay as they are: only an adapter's own nodes are computed. An adapter whose
    tensors have gone into such a value is no longer in the record of the program.
    """
    editor = Editor(program, by=by)
    constant = constant_nodes(editor.graph)
    for node in list(editor.graph.nodes):
        if not _is_last(node, constant):
            continue
        value = constant_value(editor, node)
        name = editor.add_state(f"{adapter_of(node)}_{node.name}", value.contiguous())
        node.replace_all_uses_with(editor.get(name))
        editor.changed = True
    result = editor.finish()
    gone = [a.name for a in adapters(result).values() if set(a.tensors()) - set(result.state)]
    if not gone:
        return result
    editor = Editor(result, by=by)
    for name in gone:
        forget(editor, name)
    return editor.finish()


def _is_last(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a node is an adapter's, constant, and read by what is not."""
    if node.op != "call_function" or node not in constant or not adapter_of(node):
        return False
    is_tensor = isinstance(node.meta.get("val"), Tensor)
    return is_tensor and any(u not in constant or not adapter_of(u) for u in node.users)
