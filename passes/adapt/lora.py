"""adapt.lora: a low-rank change beside each layer."""

from __future__ import annotations

from typing import Literal

import torch

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.low_rank import (
    RankPass,
    ScaledOptions,
    add_low_rank,
    kaiming,
    rank_of,
    scale_of,
    shapes,
)


class LoraOptions(ScaledOptions):
    """Options of adapt.lora."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of a: uniform within 1 / sqrt(inputs), or normal with deviation 1 / rank. b starts at
    zero, so that the function does not change. (In a table the two change places.)"""


class Lora(RankPass[LoraOptions]):
    """Lets every chosen layer compute W x + s b(a(x)), and trains a and b alone.

    a brings the input to `rank` values and b back to the outputs; s = alpha / rank. Beside a
    convolution a is one with the same kernel, stride, padding and dilation, and b has kernel 1;
    with groups each group has a part of the rank. The change merges into the weight
    (`adapt.merge`).

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3;
    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """

    kinds = (*PRODUCTS, "embedding")

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        rank, scale = rank_of(options, layer), scale_of(options, layer)
        size_a, size_b = shapes(layer, rank)
        if layer.kind == "embedding":
            start_a, start_b = torch.zeros(size_a), torch.randn(size_b, generator=generator)
        else:
            start_a = (
                kaiming(size_a, generator)
                if options.init == "kaiming"
                else torch.randn(size_a, generator=generator) / rank
            )
            start_b = torch.zeros(size_b)
        a, b = branch.parameter("lora_a", start_a), branch.parameter("lora_b", start_b)
        add_low_rank(branch, layer, a, b, scale, options.dropout)
        return f"rank {rank}"
