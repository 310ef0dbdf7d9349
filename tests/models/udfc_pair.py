"""A pair of layers to repair, shared by the tests of prune.udfc."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.repair.closed_form import Channels
from graphwright.passes.prune import Udfc


class Pair(nn.Module):
    """Convolution, batch norm, ReLU, convolution."""

    def __init__(self, channels: int = 16, act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.act, self.b = act or nn.ReLU(), nn.Conv2d(channels, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.norm(self.a(x))))


def traced(model: nn.Module) -> gw.Program:
    return gw.trace(model.eval(), (torch.randn(4, 3, 10, 10),), dynamic={"x": {0: "batch"}})


def ran(program: gw.Program, **options: Any) -> Any:
    return Udfc(**options).execute(program, Context())


def channels(rounded: bool = False, seed: int = 0) -> Channels:
    g = torch.Generator().manual_seed(seed)
    filters = torch.randn(10, 14, generator=g, dtype=torch.float64)
    offsets = torch.randn(10, generator=g, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 5, 6, 8])
    damaged = filters[kept] + rounded * 0.1 * torch.randn(6, 14, generator=g, dtype=torch.float64)
    return Channels(filters, offsets, filters.norm(dim=1), kept, damaged)
