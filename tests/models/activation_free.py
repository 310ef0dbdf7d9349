"""The activation-free denoiser of P77 (NAF-DPM), from its description."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gated(x: Tensor, axis: int = 1) -> Tensor:
    """SimpleGate: one half of the channels times the other."""
    a, b = x.chunk(2, axis)
    return a * b


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every pixel, with a gain alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.gain


class Block(nn.Module):
    """Two gated branches with scales that start at zero, moved by the time."""

    def __init__(self, c: int, time: int) -> None:
        super().__init__()
        self.time = nn.Linear(time // 2, 4 * c)
        self.norm1, self.norm2 = ChannelNorm(c), ChannelNorm(c)
        self.wide = nn.Conv2d(c, 2 * c, 1)
        self.depth = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.attention = nn.Conv2d(c, c, 1)
        self.project = nn.Conv2d(c, c, 1)
        self.up, self.down = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.beta = nn.Parameter(torch.zeros(1, c, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        moves = self.time(gated(time))[:, :, None, None]
        shift1, scale1, shift2, scale2 = moves.chunk(4, 1)
        y = self.norm1(x) * (1 + scale1) + shift1
        y = gated(self.depth(self.wide(y)))
        y = y * self.attention(y.mean((2, 3), keepdim=True))
        x = x + self.beta * self.project(y)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + self.gamma * self.down(gated(self.up(y)))


class ActivationFreeNet(nn.Module):
    """A noisy residual and the first guess (B, 3, H, W) each, and steps (B,), to the residual."""

    def __init__(self, width: int = 4, levels: int = 2) -> None:
        super().__init__()
        self.width, self.multiple = width, 2**levels
        time = 4 * width
        self.early = nn.Linear(width, 8 * width)
        self.late = nn.Linear(4 * width, time)
        self.intro, self.ending = nn.Conv2d(6, width, 3, padding=1), nn.Conv2d(width, 3, 3, 1, 1)
        sizes = [width * 2**k for k in range(levels)]
        self.encoders = nn.ModuleList(Block(c, time) for c in sizes)
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, 2) for c in sizes)
        self.middle = Block(2 * sizes[-1], time)
        self.ups = nn.ModuleList(nn.Conv2d(2 * c, 4 * c, 1, bias=False) for c in reversed(sizes))
        self.decoders = nn.ModuleList(Block(c, time) for c in reversed(sizes))

    def _time(self, step: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=step.device))
        angles = step[:, None].float() * rates
        return self.late(gated(self.early(torch.cat([angles.sin(), angles.cos()], -1)), 1))

    def forward(self, noisy: Tensor, guess: Tensor, step: Tensor) -> Tensor:
        height, width = noisy.shape[2:]
        x = torch.cat([noisy, guess], 1)
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        time = self._time(step)
        x = self.intro(x)
        skips = []
        for block, down in zip(self.encoders, self.downs, strict=True):
            x = block(x, time)
            skips.append(x)
            x = down(x)
        x = self.middle(x, time)
        for block, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            x = block(F.pixel_shuffle(up(x), 2) + skip, time)
        return self.ending(x)[:, :, :height, :width]
