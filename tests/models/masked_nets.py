"""Small networks and their calibration data for the tests of masks."""

from __future__ import annotations

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.program import Program


class Mixed(nn.Module):
    """A convolution, a grouped one, and two linear layers, the second without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 24)
        self.fc2 = nn.Linear(24, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.fc2(torch.relu(self.fc1(self.norm(h.flatten(1)))))


def images(batches: int = 6, size: int = 8) -> list[tuple[torch.Tensor, ...]]:
    """Batches of images with correlated, shifted channels."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(4, 4, generator=generator)
    return [
        (torch.einsum("nchw,cd->ndhw", torch.randn(size, 4, 6, 6, generator=generator), mix) + 0.5,)
        for _ in range(batches)
    ]


def mixed() -> Program:
    """`Mixed` as a program with a free batch size."""
    torch.manual_seed(0)
    return gw.trace(Mixed().eval(), images(1)[0], dynamic={"x": {0: "batch"}})


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and one layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids)
        return self.head(torch.relu(self.twice(torch.relu(self.twice(h)))))


def tied() -> Program:
    """`Tied` as a program with free sizes."""
    torch.manual_seed(0)
    ids = torch.arange(10).reshape(2, 5)
    return gw.trace(Tied().eval(), (ids,), dynamic={"ids": {0: "batch", 1: "seq"}})


def tokens() -> list[tuple[torch.Tensor, ...]]:
    """Batches for `tied`."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(16, (4, 5), generator=generator),) for _ in range(4)]


def error(a: Program, b: Program, batches: list[tuple[torch.Tensor, ...]]) -> float:
    """Squared difference of the outputs over all batches."""
    with torch.no_grad():
        return sum(float((a(*x) - b(*x)).square().sum()) for x in batches)
