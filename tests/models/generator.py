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


def of_three() -> nn.Module:
    """An encoder of three numbers."""
    torch.manual_seed(4)
    return nn.Linear(3, 6)


def few_threes() -> Tensor:
    """References of a domain."""
    return torch.tensor([[1.0, 0, 2], [1.0, 1, 2], [1.0, -1, 2]])


def numbers() -> nn.Module:
    """An encoder that sees every number as it is."""
    return nn.Identity()


def flat_numbers() -> nn.Module:
    """Gives no embeddings."""
    return nn.Flatten(0)
