"""A small network and data that the tests of the tuning engine share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.data.batches import Batches, Rows
from graphwright.ir.signature import Signature


class Net(nn.Module):
    """Convolution, batch norm, dropout, classifier: all that training mode is about."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(h.flatten(1)))


def fresh(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout).eval()


def traced(model: nn.Module, *shape: int) -> gw.Program:
    return gw.trace(model, (torch.randn(*shape),), {"x": {0: "batch"}})


def images(count: int = 48) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 4, 4) and labels in [0, 3) that a linear map of them tells."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 4, 4, generator=generator)
    return x, (x.flatten(1) @ torch.randn(16, 3, generator=generator)).argmax(1)


def table(signature: Signature, x: Tensor, labels: Tensor, size: int) -> Batches:
    """Batches with samples that can be read in any order, as a file gives them."""

    def take(indices) -> dict[str, Tensor]:
        return {"x": x[list(indices)], "labels": labels[list(indices)]}

    def read():
        return (take(range(i, min(i + size, len(x)))) for i in range(0, len(x), size))

    return Batches("table", signature, read, "labels", rows=Rows(len(x), size, take))
