"""A small classifier with three batch norms, trained on striped images: seconds, not minutes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import graphwright as gw

CLASSES = 4
"""Stripes along x, along y, and along the two diagonals."""


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 8, 8), a stripe pattern each with a phase and colours of its own, plus
    noise; and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([x, y, (x + y) / 1.4, (x - y) / 1.4])[labels]
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    pattern = torch.sin(1.6 * waves + phase).unsqueeze(1)
    colours = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.2 * torch.randn(count, 3, 8, 8, generator=generator)
    return pattern * colours + noise + torch.tensor([0.5, 0.0, -0.5]).view(3, 1, 1), labels


class Net(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def fresh(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), norm(outputs), nn.ReLU()]
    return Net(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


@cache
def trained() -> nn.Module:
    model = fresh().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.random.fork_rng(), torch.enable_grad():
        for step in range(60):
            x, labels = images(32, seed=step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    return model.eval()


def traced(model: nn.Module, batch: bool = True) -> gw.Program:
    dynamic = {"x": {0: "batch"}} if batch else None
    return gw.trace(model.eval(), (images(4)[0],), dynamic=dynamic)


@cache
def program() -> gw.Program:
    return traced(trained())
