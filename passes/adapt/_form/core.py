"""Branches b R a with fixed outer factors and a trained square matrix between them."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.low_rank import back, change, shapes, through

aten = torch.ops.aten


def add_core(
    branch: Branch,
    layer: Layer,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> None:
    """Adds s b R a x to the layer's output.

    Args:
        branch: beside the layer.
        layer: the layer.
        a: (rank, columns), fixed.
        core: R (rank, rank), trained.
        b: (out, rank), fixed.
        scale: s.
        dropout: probability on what the branch reads.
    """
    rank = len(core)
    branch.scale = scale
    size_a, size_b = shapes(layer, rank)
    left = branch.constant("lora_a", a.to(branch.dtype).reshape(size_a))
    middle = branch.parameter("core", core)
    right = branch.constant("lora_b", b.to(branch.dtype).reshape(size_b))
    low = through(branch, layer, left, dropout)
    if len(size_a) > 2:
        spatial = len(size_a) - 2
        kernel = branch.add(aten.reshape.default, middle, [rank, rank, *(1,) * spatial])
        low = back(branch, layer, low, kernel)
    else:
        low = branch.add(aten.linear.default, low, middle)
    if scale != 1.0:
        low = branch.add(aten.mul.Scalar, low, scale)
    branch.finish(branch.add(aten.add.Tensor, branch.tip, back(branch, layer, low, right)))


def with_core(layer: Adapted) -> Merged:
    """The layer's weight with s b R a added, and its bias."""
    a, core, b = (layer.parts[part] for part in ("lora_a", "core", "lora_b"))
    delta = change(layer, a, (b.flatten(1) @ core).reshape(b.shape))
    return layer.weight + layer.scale * delta, layer.bias
