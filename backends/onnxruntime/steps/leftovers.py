"""Lists ordinary ops that the steps left although a fused kernel exists for their kind."""

from __future__ import annotations

import torch

from graphwright.backends.onnxruntime.steps.block_codes import kernel_block, stored_blocks
from graphwright.backends.onnxruntime.steps.graph import is_float32
from graphwright.ir.files.pickles import counted, listed
from graphwright.ir.ops.attention import attention
from graphwright.ir.ops.blocks import dequantize_blocks
from graphwright.ir.ops.table import dequantize_table
from graphwright.ir.program import Program

aten = torch.ops.aten

REBUILT = "weight rebuilt at load"
REBUILDING = (dequantize_blocks, dequantize_table)


def leftovers(program: Program) -> list[dict[str, str]]:
    """Node, op and reason: attention in separate kernels, weights that are rebuilt."""
    left = []
    for node in program.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        if not is_float32(node):
            why = "the attention kernel of the CPU takes float32 only"
        elif node.meta["val"].dim() != 4:
            why = "the attention kernel wants (batch, heads, length, width)"
        else:
            why = "its mask or sizes have no exact form in the attention kernel"
        left.append({"node": node.name, "op": "attention", "why": why})
    for node in program.graph.find_nodes(op="call_function", target=attention):
        why = "the attention kernel knows no capped scores and no sinks"
        left.append({"node": node.name, "op": "attention", "why": why})
    return left + _rebuilt_weights(program)


def _rebuilt_weights(program: Program) -> list[dict[str, str]]:
    """Weights in blocks that standard ops rebuild: small in the file, float in memory."""
    left = []
    for node in program.graph.nodes:
        if node.target not in REBUILDING or not node.users:
            continue
        if any(source.op != "get_attr" for source in node.all_input_nodes[:1]):
            continue  # rows that are rebuilt as they are read
        if node.target is dequantize_table and len(node.args[4]) < 2:
            continue  # scales that are codes themselves
        why = "no kernel reads its codes where it is used"
        stored = stored_blocks(node)
        if stored is not None and not kernel_block(stored):
            why = f"no kernel has blocks of {stored.block}"
        weight = str(node.all_input_nodes[0].target)
        weight = weight.removesuffix("_codes").removesuffix(".codes")
        left.append({"node": node.name, "op": REBUILT, "why": why, "weight": weight})
    return left


def rebuilt_warnings(left: list[dict[str, str]]) -> list[str]:
    """A line on weights that are stored in few bits and computed with as floats, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in left:
        if row["op"] == REBUILT:
            reasons.setdefault(row["why"], []).append(row["weight"])
    return [
        f"{counted(len(names), 'weight')} of few bits rebuilt as floats when the model is loaded, "
        f"for {why}: {', '.join(listed(names, 4))}"
        for why, names in reasons.items()
    ]


def has_compressed_weights(program: Program) -> bool:
    """Whether one of our ops rebuilds a weight."""
    return any(
        getattr(node.target, "namespace", "") == "graphwright"
        and all(source.op == "get_attr" for source in node.all_input_nodes)
        for node in program.graph.nodes
        if node.op == "call_function"
    )
