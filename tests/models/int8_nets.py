"""A residual net and a U-Net on scikit-learn's digits at 16x16, trained in a minute.

The U-Net tells the strokes from noise: accuracy is the share of pixels.
"""

from __future__ import annotations

import torch
from models import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

EPOCHS, BATCH, LR = 6, 64, 2e-3


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b, self.norm_b = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm_a(self.a(x)))
        return torch.relu(self.norm_b(self.b(h)) + x)


class ResNet(nn.Module):
    """A stem, two stages of one block each, and a classifier: 6 convolutions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.first, self.second = Residual(width), Residual(2 * width)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(torch.relu(self.norm(self.stem(x))))
        return self.fc(self.second(torch.relu(self.down(h))).mean((2, 3)))


class UNet(nn.Module):
    """Two levels, up again by transposed convolutions: 9 convolutions, 2 of them transposed."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c = self._two(1, width), self._two(width, 32), self._two(32, 64)
        self.up_b, self.up_a = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, width, 2, 2)
        self.out = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _two(inputs: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(nn.functional.max_pool2d(a, 2))
        c = self.c(nn.functional.max_pool2d(b, 2))
        b = self.up_b(c) + b
        return self.out(self.up_a(b) + a)


def samples(name: str, *, test: bool) -> tuple[Tensor, Tensor]:
    """Inputs and labels: digits and their classes, or noisy digits and their strokes."""
    x, labels, x_test, labels_test = digits.data()
    images = interpolate(x_test if test else x, size=(16, 16), mode="bilinear")
    if name == "resnet":
        return images, labels_test if test else labels
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(int(test)))
    return images + 0.25 * noise, (images[:, 0] > 0.4).long()


def trained(name: str, seed: int = 0, epochs: int = EPOCHS, images: int | None = None) -> nn.Module:
    """The net `resnet` or `unet`, trained by Adam; in evaluation mode."""
    torch.manual_seed(seed)
    model: nn.Module = ResNet() if name == "resnet" else UNet()
    x, y = (part[:images] for part in samples(name, test=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples (or pixels) that are told right."""
    return float((logits.argmax(1) == labels).double().mean())
