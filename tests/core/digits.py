"""A CNN for scikit-learn's digits; the factory that specs of these tests name."""

from __future__ import annotations

import torch
from torch import nn


class DigitsNet(nn.Module):
    """Two convolutions with batch norm, a dropout and a classifier: 8x8 images to ten classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(2 * width * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        h = nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(h))), 2)
        return self.fc(self.drop(h.flatten(1)))


def build(width: int = 16) -> DigitsNet:
    """The untrained network."""
    return DigitsNet(width)


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, held-out images and labels; images (n, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1400], order[1400:]
    return images[train], labels[train], images[held_out], labels[held_out]


def trained(epochs: int = 6) -> DigitsNet:
    """The network after a few epochs of Adam, in eval mode; about 97% on the held-out images."""
    torch.manual_seed(0)
    model = build()
    images, labels, _, _ = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()
