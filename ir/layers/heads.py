"""Which outputs of a layer become attention's queries, keys and values, head by head.

It is read off gradients and not off names and shapes: a channel belongs to the heads that change
with it. So fused projections of any layout, rotations of positions, norms of single heads and
heads that several queries share are all told apart alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import KINDS, PRODUCTS
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.ops.attention import attention as capped_attention
from graphwright.ir.program import Program

aten = torch.ops.aten

ROLES = ("q", "k", "v")
"""Queries, keys and values."""

Heads = dict[str, list[Tensor]]
"""Channels (int64, rising) of every head, in the order of the heads, by role."""

FUSED = (aten.scaled_dot_product_attention.default, capped_attention)
"""Calls that are an attention as a whole: queries, keys and values are their first arguments."""

SOFTMAX = (aten.softmax.int, aten._softmax.default)
POINTWISE = ("add", "sub", "mul", "div", "masked_fill", "where", "to", "clone", "maximum",
             "contiguous")  # fmt: skip
"""Calls that may stand between the products of an attention that is written out."""


def attention_heads(program: Program, chosen: Sequence[Layer]) -> dict[str, Heads]:
    """Heads of every chosen layer whose outputs an attention reads, by name of the layer.

    The program runs once, on its examples. A layer's outputs count as far as the next product.

    Raises:
        ModelError: a channel belongs to several heads, or to other ones in another call.
    """
    names = {layer.node.name: layer.name for layer in chosen}
    run = _Run(program, names)
    with torch.enable_grad():
        run.run(*program.examples)
    for layer, heads in run.found.items():
        everything = torch.cat([channels for role in heads.values() for channels in role])
        if len(everything.unique()) < len(everything):
            raise ModelError(
                f"outputs of {layer!r} are read by several heads of attention at once",
                fix="Name them by their numbers, as in `0:64`.",
            )
    return run.found


class _Run(fx.Interpreter):
    """Runs a program, and looks what the operands of every attention change with."""

    def __init__(self, program: Program, chosen: dict[str, str]) -> None:
        super().__init__(program.module)
        self.chosen = chosen
        self.roles = _operands(program.graph)
        self.live: dict[str, Tensor] = {}
        self.found: dict[str, Heads] = {}
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor):
            return value
        if n.op != "call_function" or KINDS.get(n.target) in (*PRODUCTS, "embedding"):
            value = value.detach()
        if n.name in self.chosen and value.is_floating_point():
            value = value.requires_grad_()
            self.live[n.name] = value
        for role in self.roles.get(n.name, ()):
            if value.requires_grad:
                self._look(value, role)
        return value.detach() if n.target in FUSED else value

    def _look(self, operand: Tensor, role: str) -> None:
        axis = operand.dim() - 3 if operand.dim() > 3 else None
        heads = [operand] if axis is None else list(operand.unbind(axis))
        own: dict[str, list[Tensor]] = {}
        for head in heads:
            weights = torch.rand(head.shape, generator=self.generator) + 0.5
            total = (head * weights.to(head)).sum()
            gradients = torch.autograd.grad(
                total, list(self.live.values()), retain_graph=True, allow_unused=True
            )
            for node, gradient in zip(self.live, gradients, strict=True):
                if gradient is None:
                    continue
                channels = gradient.flatten(0, -2).abs().sum(0).nonzero().flatten().cpu()
                known = own.setdefault(self.chosen[node], [])
                if len(channels) and not any(torch.equal(channels, other) for other in known):
                    known.append(channels)
        for layer, found in own.items():
            before = self.found.setdefault(layer, {}).setdefault(role, found)
            if len(before) != len(found) or any(
                not torch.equal(a, b) for a, b in zip(before, found, strict=True)
            ):
                raise ModelError(f"several calls of {layer!r} have other heads in its outputs")


def attentions(graph: fx.Graph) -> list[tuple[Any, Any, Any]]:
    """Queries, keys and values (nodes) of every attention, fused or written out."""
    found: list[tuple[Any, Any, Any]] = []
    for node in graph.nodes:
        if node.target in FUSED:
            q, k, v = node.args[:3]
            found.append((q, k, v))
        elif node.target in SOFTMAX and (operands := _written_out(node)):
            found.append(operands)
    return found


def _operands(graph: fx.Graph) -> dict[str, list[str]]:
    """Roles of the values that attentions read, by name of the node."""
    found: dict[str, list[str]] = {}
    for operands in attentions(graph):
        for role, operand in zip(ROLES, operands, strict=True):
            if isinstance(operand, fx.Node):
                found.setdefault(operand.name, []).append(role)
    return found


def _written_out(softmax: fx.Node) -> tuple[Any, Any, Any] | None:
    """q, k and v around a softmax that stands between two products."""
    before: Any = softmax.args[0]
    while isinstance(before, fx.Node) and before.target is not aten.matmul.default:
        if _name(before) not in POINTWISE:
            return None
        inputs = [a for a in before.args if isinstance(a, fx.Node)]
        before = inputs[-2] if _name(before) == "where" else inputs[0]
    after = softmax
    while len(after.users) == 1 and _name(after := next(iter(after.users))) in POINTWISE:
        pass
    if not isinstance(before, fx.Node) or after.target is not aten.matmul.default:
        return None
    q, k = before.args[:2]
    return q, k, after.args[1]


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
