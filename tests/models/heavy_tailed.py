"""A layer and inputs of heavy tails, shared by the tests of quantize.adaquant."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.layers.products import Geometry
from graphwright.passes.quantize._math import adaquant


def heavy_tailed(rows: int, seed: int = 0) -> Tensor:
    """Correlated inputs (rows, 24), some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(5))
    return (torch.randn(rows, 24, generator=generator) ** 3) @ mixing / 5


def layer() -> tuple[Geometry, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 24, generator=generator) ** 3 / 10
    return Geometry("linear", (16, 24)), weight, torch.randn(16, generator=generator)


def samples(x: Tensor) -> adaquant.Samples:
    low, high = float(x.amin(1).mean()), float(x.amax(1).mean())
    return adaquant.Samples([x], [x], low, high)
