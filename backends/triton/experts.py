"""Rewrites to the routed products of experts on weights that stay compressed."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import EXPERTS, operators
from graphwright.ir.ops.blocks import dequantize_blocks
from graphwright.ir.ops.expert_blocks_linear import expert_blocks_linear
from graphwright.ir.ops.experts import expert_linear
from graphwright.ir.ops.low_rank import add_low_rank
from graphwright.ir.rewrite import Match, Rewrite, op, value
from graphwright.ir.stored.read import is_call, stacked_rows

aten = torch.ops.aten
ROUTED = tuple(operators(EXPERTS))


class ExpertsLowRankBeside(Rewrite):
    """Experts on weights + b a: the experts on the weights, and two small products beside them."""

    pattern = op(ROUTED, value("x"), value("weight"), value("experts"), rest=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        found = _corrected(match.node("weight"))
        return None if found is not None else "its weight has no low-rank correction"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        weight, x, experts = match.node("weight"), match["x"], match["experts"]
        corrected = _corrected(weight)
        assert corrected is not None
        base, b, a = corrected.args

        def call(target: object, *args: object) -> fx.Node:
            return editor.call(target, *args, before=match.root, like=match.root)

        plain = call(weight.target, base, *weight.args[1:]) if weight is not corrected else base
        bias = full_arguments(match.root)[0][3]
        y = call(match.root.target, x, plain, experts, bias)
        low = call(expert_linear, x, a, experts, None)
        return call(aten.add.Tensor, y, call(expert_linear, low, b, experts, None))


def _corrected(weight: fx.Node) -> fx.Node | None:
    """The correction that a stack is the result of, seen through a turn of its matrices."""
    node = weight.args[0] if is_call(weight, aten.transpose.int) else weight
    return node if isinstance(node, fx.Node) and is_call(node, add_low_rank) else None


class ExpertBlocks(Rewrite):
    """Experts on a stack of weights in blocks: the weights stay as stored."""

    pattern = op(ROUTED, value("x"), value("weight"), value("experts"), rest=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        rows = stacked_rows(match.node("weight"))
        return None if is_call(rows, dequantize_blocks) else "its weight is not stored in blocks"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        weight = match.node("weight")
        rows = stacked_rows(weight)
        assert rows is not None
        codes, scale, zero_point, bits, block, _ = full_arguments(rows)[0]
        return editor.call(
            expert_blocks_linear, match["x"], codes, scale, zero_point, match["experts"],
            full_arguments(match.root)[0][3], int(weight.meta["val"].shape[0]), bits, block,
            before=match.root, like=match.root,
        )  # fmt: skip
