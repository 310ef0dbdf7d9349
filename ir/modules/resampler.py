"""Resampling of an image at learned places (P18): an implicit image, and who shifts the places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 256
"""Width of the hidden layers, as published."""


class ResidualBlock(nn.Module):
    """Two convolutions around a ReLU, added to what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(torch.relu(self.first(x)))
        return result


class Encoder(nn.Module):
    """EDSR's body: an image (B, C, H, W) to features (B, width, H, W)."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        start = self.head(image)
        result: Tensor = start + self.tail(self.body(start))
        return result


class Implicit(nn.Module):
    """A function of a place: an MLP on the features around the nearest pixel, and the way to it.

    The first layer reads the nine features around the pixel, so that it is a convolution, the way
    to the pixel, and the size of a pixel. The last layer starts at zero.

    Args:
        width: channels of the features.
        out: channels of the result.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(width, HIDDEN, 3, padding=1)
        self.place = nn.Linear(4, HIDDEN, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.last = nn.Linear(HIDDEN, out)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()

    def behind_the_first(self, h: Tensor, way: Tensor) -> Tensor:
        """(B, Q, out) from the first layer's product with features (B, Q, HIDDEN).

        Args:
            h: see above.
            way: (B, Q, 2) from the pixel to the place, in half pixels: rows, columns.
        """
        size = torch.full_like(way, 2.0)  # of a pixel, in the same unit
        h = torch.relu(h + self.place(torch.cat([way, size], -1)))
        for layer in self.hidden:
            h = torch.relu(layer(h))
        found: Tensor = self.last(h)
        return found


class Resampler(nn.Module):
    """An image (B, C, H, W) in [0, 1] to the same image, read anew at shifted places.

    One network finds a shift for every pixel, another gives the colour at any place: the image's
    own, plus a learned change, mixed of the four pixels around the place. Both read one encoder.
    At the start the shifts and the changes are zero, and the image is itself.

    Args:
        channels: C.
        width: of the encoder's features.
        blocks: of the encoder.
    """

    def __init__(self, channels: int = 3, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.encoder = Encoder(channels, width, blocks)
        self.colour = Implicit(width, channels)
        self.sampler = Implicit(width, 2)

    def shift(self, image: Tensor) -> Tensor:
        """(B, H W, 2) shifts of the places, in units of half an image: rows, columns."""
        h = _rows(self.sampler.features(self.encoder(image)))
        return self.sampler.behind_the_first(h, h.new_zeros(h.shape[0], h.shape[1], 2))

    def read(self, image: Tensor, shift: Tensor) -> Tensor:
        """The image (B, C, H, W) at its pixels' places plus `shift`."""
        height, width = image.shape[2:]
        h = _rows(self.colour.features(self.encoder((image - 0.5) / 0.5)))
        own = _rows(image)
        rows, columns = _places(image)
        y = rows + shift[..., 0] * (height / 2)
        x = columns + shift[..., 1] * (width / 2)
        top, left = torch.floor(y), torch.floor(x)
        total = torch.zeros_like(own)
        for down in (0, 1):
            for right in (0, 1):
                share = _share(y - top, down) * _share(x - left, right)
                row = (top + down).clamp(0, height - 1)
                column = (left + right).clamp(0, width - 1)
                index = (row * width + column).long().unsqueeze(-1)
                way = 2 * torch.stack([y - row, x - column], -1)
                change = self.colour.behind_the_first(_picked(h, index), way)
                total = total + share.unsqueeze(-1) * (_picked(own, index) + change)
        return total.mT.reshape(image.shape)

    def forward(self, image: Tensor) -> Tensor:
        return self.read(image, self.shift(image))


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H W, C)."""
    return x.flatten(2).mT


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    return torch.gather(rows, 1, index.expand(-1, -1, rows.shape[2]))


def _share(fraction: Tensor, side: int) -> Tensor:
    return fraction if side else 1 - fraction


def _places(image: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, (H W,) each."""
    height, width = image.shape[2:]
    rows = torch.arange(height, dtype=image.dtype, device=image.device)
    columns = torch.arange(width, dtype=image.dtype, device=image.device)
    return (
        rows.unsqueeze(1).expand(height, width).reshape(-1),
        columns.unsqueeze(0).expand(height, width).reshape(-1),
    )
