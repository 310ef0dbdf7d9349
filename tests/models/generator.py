"""A small generator with a latent, and features of a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Generator(nn.Module):
    """A mapping to the latent, which two layers of the synthesis read."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.start = nn.Parameter(torch.randn(12))
        self.style_1, self.style_2 = nn.Linear(6, 12), nn.Linear(6, 12)
        self.mix, self.last = nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        h = torch.tanh(self.start * self.style_1(w))
        return self.last(torch.tanh(self.mix(h) * self.style_2(w)))


def features() -> nn.Module:
    """A discriminator's features, without its last layer."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 32), nn.LeakyReLU(0.2), nn.Linear(32, 24), nn.Tanh())


def of_hidden() -> nn.Module:
    """Features that do not fit."""
    return nn.Linear(7, 3)
