"""Weights that plain operators compute from stored tensors: weight norm, spectral norm, and such.

A pass that replaces stored weights stores these first: they are constants of an inference program.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_nodes, constant_value, is_static
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program

PLAIN_MOVES = frozenset(
    {"transpose", "t", "permute", "reshape", "unsqueeze", "squeeze", "expand", "to", "slice",
     "select", "flatten", "unflatten", "alias", "numpy_T", "mT", "matrix_H", "swapaxes"}
)  # fmt: skip
"""Moves of one tensor. Storing them alone stores a second copy and saves next to nothing."""

LEAST_SHARE = 0.5
"""Values of the tensors a weight is computed from, at least, as a share of its own: below, what is
computed is a compressed form (a product of low rank), and stored would be larger."""


def store_weights(program: Program, by: str) -> tuple[Program, list[str]]:
    """The program with such weights stored under their module's name, and the layers' names.

    Weights in a compressed form of ours, and stored tensors that are only moved, stay as they are;
    without anything to store the very same program comes back.

    Args:
        program: left as it is.
        by: id of the pass that asks.
    """
    if all(layer.weight for layer in layers(program)):
        return program, []
    editor = Editor(program, by=by)
    copied = layers(program.replace(graph=editor.graph))
    constant = constant_nodes(editor.graph, _is_plain)
    stored: list[str] = []
    for layer in [layer for layer in copied if not layer.weight]:
        node = weight_node(layer)
        if node.op == "get_attr":
            stored.append(layer.name)  # tied to a layer before it
        elif node in constant and _is_computed(node):
            owner = layer.name.replace(".parametrizations.weight", "")
            value = constant_value(editor, node).contiguous().clone()
            name = editor.add_state(f"{owner}.weight", torch.nn.Parameter(value))
            editor.replace(node, editor.get(name))
            stored.append(owner)
    if not stored:
        return program, []
    return editor.finish(), stored


def _is_plain(node: fx.Node) -> bool:
    """Whether a call is no compressed form of ours, and gives one tensor of known sizes."""
    ours = getattr(node.target, "namespace", "") == "graphwright"
    return node.op == "get_attr" or (not ours and is_static(node))


def _is_computed(node: fx.Node) -> bool:
    chain, seen = [node], {node}
    while chain:
        for operand in chain.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                chain.append(operand)
    calls = [n for n in seen if n.op == "call_function"]
    if all(op_name(n) in PLAIN_MOVES for n in calls):
        return False
    sources = sum(_values(n) for n in seen if n.op == "get_attr")
    return sources >= LEAST_SHARE * _values(node)


def _values(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) if isinstance(value, Tensor) else 0
