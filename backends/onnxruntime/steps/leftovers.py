"""What the steps left as ordinary ops although a fused kernel exists for its kind."""

from __future__ import annotations

import torch

from graphwright.backends.onnxruntime.steps.graph import is_float32
from graphwright.ir.program import Program

aten = torch.ops.aten


def leftovers(program: Program) -> list[dict[str, str]]:
    """Node, op and reason of every attention that runs as separate kernels."""
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
    return left
