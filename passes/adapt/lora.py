"""adapt.lora: a low-rank change beside each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.low_rank import (
    RankPass,
    ScaledOptions,
    add_low_rank,
    kaiming,
    matrix_shape,
    rank_of,
    scale_of,
    shapes,
)
from graphwright.passes.adapt._form.slices import (
    SlicedOptions,
    add_sliced,
    check_rank,
    find_slices,
    no_slices,
    slices_of,
)
from graphwright.passes.base import Context


class LoraOptions(SlicedOptions, ScaledOptions):
    """Options of adapt.lora."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of a: uniform within 1 / sqrt(inputs), or normal with deviation 1 / rank. b starts at
    zero, so that the function does not change. (In a table the two change places.)"""


class Lora(RankPass[LoraOptions]):
    """Lets every chosen layer compute W x + s b(a(x)), and trains a and b alone.

    a brings the input to `rank` values and b back to the outputs; s = alpha / rank. Beside a
    convolution a is one with the same kernel, stride, padding and dilation, and b has kernel 1;
    with groups each group has a part of the rank. `outputs` names slices of a fused projection, or
    heads: each has an a of its own, and a b for its outputs alone. The change merges into the
    weight (`adapt.merge`).

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3;
    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """

    kinds = (*PRODUCTS, "embedding")

    def prepare(
        self, program: Program, chosen: Sequence[Layer], context: Context
    ) -> dict[str, list[Tensor]]:
        """The slices of outputs that are changed, by layer."""
        return find_slices(program, chosen, self.options.outputs, self.id)

    def refusal(self, layer: Layer) -> str:
        return super().refusal(layer) or no_slices(layer, self.options.outputs)

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        rank, scale = rank_of(options, layer), scale_of(options, layer)
        size_a, size_b = shapes(layer, rank)
        if options.outputs:
            return self._attach_slices(branch, layer, generator, rank, scale)
        if layer.kind == "embedding":
            start_a, start_b = torch.zeros(size_a), torch.randn(size_b, generator=generator)
        else:
            start_a, start_b = self._start(size_a, rank, generator), torch.zeros(size_b)
        a, b = branch.parameter("lora_a", start_a), branch.parameter("lora_b", start_b)
        add_low_rank(branch, layer, a, b, scale, options.dropout)
        return f"rank {rank}"

    def _attach_slices(
        self,
        branch: Branch,
        layer: Layer,
        generator: torch.Generator,
        rank: int,
        scale: float,
    ) -> str:
        """A change of its own for every slice of the outputs; all run as one."""
        slices = slices_of(branch, layer)
        if not slices:
            return "has none of the outputs"
        check_rank(layer, slices, rank)
        columns, count = matrix_shape(layer)[1], sum(map(len, slices))
        start = [self._start((rank, columns), rank, generator) for _ in slices]
        rows = torch.zeros(count, rank)
        add_sliced(branch, layer, slices, torch.cat(start), rows, scale, self.options.dropout)
        return f"{len(slices)} of rank {rank} on {count} outputs"

    def _start(self, size: tuple[int, ...], rank: int, generator: torch.Generator) -> Tensor:
        if self.options.init == "kaiming":
            return kaiming(size, generator)
        return torch.randn(size, generator=generator) / rank
