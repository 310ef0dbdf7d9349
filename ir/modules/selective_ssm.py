"""Selective state-space blocks on a feature map, and the projector of P84 made of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.ops.selective_scan import selective_scan

Block = Literal["ss2d", "mamba"]

DIRECTIONS = 4
"""Ways through a map: by rows, by columns, and each of them backwards."""

FASTEST, SLOWEST = 0.1, 0.001
"""Range of the time steps at the start; they lie uniformly in logarithms."""


class SelectiveScan(nn.Module):
    """Tokens (B, L, D) to tokens (B, L, D): the scan, its time steps, and the skip.

    Args:
        width: channels D.
        states: N of every channel.
        rank: of the projection that the time steps come from.
    """

    def __init__(self, width: int, states: int, rank: int) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.x_proj = nn.Linear(width, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        spread = math.log(FASTEST) - math.log(SLOWEST)
        step = torch.exp(torch.rand(width) * spread + math.log(SLOWEST))
        with torch.no_grad():  # softplus of the bias is the step
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        counted = torch.arange(1, states + 1, dtype=torch.float32)
        self.a_log = nn.Parameter(torch.log(counted).repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        rank, b, c = self.x_proj(x).split(self.sizes, dim=-1)
        delta = F.softplus(self.dt_proj(rank))
        y: Tensor = selective_scan(x, delta, -torch.exp(self.a_log), b, c)
        return y + self.skip * x


class Ss2d(nn.Module):
    """A map (B, H, W, C) to one (B, H, W, C): four scans with weights of their own, one gate."""

    def __init__(self, width: int, states: int, rank: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.scans = nn.ModuleList(SelectiveScan(width, states, rank) for _ in range(DIRECTIONS))
        self.out_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        by_row: Tensor = self.scans[0](rows) + self.scans[1](rows.flip(1)).flip(1)
        by_column: Tensor = self.scans[2](columns) + self.scans[3](columns.flip(1)).flip(1)
        turned = x.transpose(1, 2)
        y = by_row.view_as(x) + by_column.view_as(turned).transpose(1, 2)
        normed: Tensor = self.out_norm(y)
        return normed * F.silu(gate)


class Mamba(nn.Module):
    """A map (B, H, W, C) to one (B, H, W, C): one block that goes through it in all four ways."""

    def __init__(self, width: int, states: int, rank: int, taps: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv = nn.Conv1d(width, width, taps, groups=width)
        self.scan = SelectiveScan(width, states, rank)

    def _along(self, tokens: Tensor) -> Tensor:
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)
        past = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        x = F.silu(self.conv(past)).transpose(1, 2)
        y: Tensor = self.scan(x)
        return y * F.silu(gate)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        by_row = self._along(rows) + self._along(rows.flip(1)).flip(1)
        by_column = self._along(columns) + self._along(columns.flip(1)).flip(1)
        turned = x.transpose(1, 2)
        return by_row.view_as(x) + by_column.view_as(turned).transpose(1, 2)


class ProjectorBranch(nn.Module):
    """A feature map (B, C, H, W) to features (B, D) that follow from it; zeros at the start.

    The map goes through two pointwise convolutions with a norm, gets a place embedding, is scanned
    in four directions, and its tokens are averaged. The gate's half of `in_proj` starts at zero.

    Args:
        channels: C.
        height, width: of the map; the norm and the embedding have a value for every place.
        out: D.
        states: of every channel.
        rank: of the time steps; as many as states when None.
        block: the scanning block.
    """

    def __init__(
        self, channels: int, height: int, width: int, out: int, states: int = 256,
        rank: int | None = None, block: Block = "ss2d",
    ) -> None:  # fmt: skip
        super().__init__()
        self.mlp_proj = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.LayerNorm([2 * channels, height, width]),
            nn.LeakyReLU(0.1),
            nn.Conv2d(2 * channels, out, 1, bias=False),
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, height, width, out))
        kind = Ss2d if block == "ss2d" else Mamba
        self.block = kind(out, states, states if rank is None else rank)
        with torch.no_grad():
            self.block.in_proj.weight[out:].zero_()

    def forward(self, feature: Tensor) -> Tensor:
        x = self.mlp_proj(feature).permute(0, 2, 3, 1) + self.pos_embed
        scanned: Tensor = self.block(x)
        return scanned.mean((1, 2))
