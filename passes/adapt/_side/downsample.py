"""From the width of the model to that of a side network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Downsample = Literal["adapter", "low_rank", "linear", "max_pool", "avg_pool"]

Call = Callable[..., fx.Node]
Store = Callable[[str, Tensor], fx.Node]


def downsampled(
    kind: Downsample, x: fx.Node, factor: int, rank: int, call: Call, store: Store,
    generator: torch.Generator,
) -> fx.Node:  # fmt: skip
    """x (..., width) brought to width / factor features.

    Args:
        kind: `linear`, D x; `low_rank`, B A x; `adapter`, norm(B silu(A x)); or the largest or the
            mean of every `factor` neighbouring features, without parameters.
        x: activation.
        factor: of the reduction.
        rank: values between A and B.
        call: adds a call.
        store: stores a parameter under a name.
        generator: of the matrices.
    """
    width = int(x.meta["val"].shape[-1])
    narrow = width // factor
    if kind in ("max_pool", "avg_pool"):
        windows = call(aten.unflatten.int, x, -1, [narrow, factor])
        if kind == "max_pool":
            return call(aten.amax.default, windows, [-1], False)
        return call(aten.mean.dim, windows, [-1], False)
    if kind == "linear":
        return call(aten.linear.default, x, store("weight", drawn(narrow, width, generator)))
    low = call(aten.linear.default, x, store("down", drawn(rank, width, generator)))
    if kind == "adapter":
        low = call(aten.silu.default, low)
    out = call(aten.linear.default, low, store("up", drawn(narrow, rank, generator)))
    if kind == "low_rank":
        return out
    norm = store("norm_weight", torch.ones(narrow)), store("norm_bias", torch.zeros(narrow))
    return call(aten.layer_norm.default, out, [narrow], *norm, 1e-5)


def drawn(out: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix as `nn.Linear` draws it: uniform within 1 / sqrt(columns)."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(out, columns).uniform_(-bound, bound, generator=generator)
