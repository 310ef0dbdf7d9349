"""adapt.allora: a low-rank change whose gradient is larger where the change is still small."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.record import Adapter
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook
from graphwright.passes.adapt._form.low_rank import (
    RankOptions,
    RankPass,
    add_low_rank,
    kaiming,
    rank_of,
    shapes,
)

aten = torch.ops.aten


class AlloraOptions(RankOptions):
    """Options of adapt.allora."""

    eta: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the gradient where the change is zero, as at the start."""


class Allora(RankPass[AlloraOptions]):
    """A low-rank change without dropout and without a scale, whose gradient is scaled row by row.

    The gradient that reaches row i of the change b a is multiplied by
    1 / sqrt(||(b a)_i|| + 1 / eta^2): by eta at the start, and by less as the row grows. What
    flows on to the layer's input is left alone. In inference it is an `adapt.lora` with scale 1.

    Source: Huang and Balestriero 2024, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal
    Flaws", section 4. No code is published; the exponent is read from the text.
    """

    papers = ("P14",)
    kinds = MATRICES

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        rank = rank_of(self.options, layer)
        size_a, size_b = shapes(layer, rank)
        a = branch.parameter("lora_a", kaiming(size_a, generator))
        b = branch.parameter("lora_b", torch.zeros(size_b))
        add_low_rank(branch, layer, a, b, 1.0)
        return f"rank {rank}"

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        return [RowScaled(adapter)]


class RowScaled(Hook):
    """Lets the branches of `adapt.allora` run with their own gradient while they are trained."""

    def __init__(self, adapter: Adapter) -> None:
        self.name = adapter.name
        self.eta = float(adapter.options["eta"])
        self.tensors = set(adapter.tensors())

    def on_graph(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            low, b = node.args[:2]
            if adapter_of(node) != self.name or str(b.target) not in self.tensors:
                continue
            if low.target is not aten.linear.default or adapter_of(low) != self.name:
                continue
            x, a = low.args[:2]
            with graph.inserting_before(node):
                new = graph.call_function(row_scaled, (x, a, b, self.eta))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        graph.eliminate_dead_code()


class _RowScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, eta: float) -> Tensor:
        low = torch.nn.functional.linear(x, a)
        ctx.save_for_backward(x, low, a, b)
        ctx.eta = eta
        return torch.nn.functional.linear(low, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, low, a, b = ctx.saved_tensors
        grad_x = gradient @ b @ a if ctx.needs_input_grad[0] else None
        scaled = (gradient * row_factors(a, b, ctx.eta).to(gradient.dtype)).flatten(0, -2)
        grad_b = scaled.t() @ low.flatten(0, -2)
        grad_a = (scaled @ b).t() @ x.flatten(0, -2)
        return grad_x, grad_a, grad_b, None


def row_scaled(x: Tensor, a: Tensor, b: Tensor, eta: float) -> Tensor:
    """b a x, whose gradients of a and b have every row of b a multiplied by its factor."""
    result: Tensor = _RowScaled.apply(x, a, b, eta)  # type: ignore[no-untyped-call]
    return result


def row_factors(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """1 / sqrt(||(b a)_i|| + 1 / eta^2) of every row i, without forming b a: (out,)."""
    wide = b.float()
    squares = ((wide @ (a.float() @ a.float().t())) * wide).sum(1).clamp_min(0)
    return (squares.sqrt() + 1 / eta**2).rsqrt()
