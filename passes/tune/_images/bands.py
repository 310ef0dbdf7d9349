"""High-pass bands of images, and a network that embeds images by them."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.modules.haar import haar_kernels

SLOPE = 0.2
"""Of the leaky ReLUs."""

WIDTHS = (1, 1, 2, 2, 4, 4, 8, 8)
"""Channels of the convolutions, in multiples of the first; every second one halves the image."""

FEATURES = (0, 2, 4, 6)
"""Convolutions whose results, behind the leaky ReLU, are features."""


def high_bands(images: Tensor) -> Tensor:
    """The three bands of a Haar transform that a constant image has nothing in.

    Args:
        images: (batch, channels, height, width); an odd size is made even by repeating its edge.

    Returns:
        (batch, 3 * channels, height / 2, width / 2), the bands of one channel in a row.
    """
    height, width = images.shape[2:]
    even = F.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    kernels = haar_kernels((True, True), 4)[1:].to(images)
    channels = images.shape[1]
    return F.conv2d(even, kernels.repeat(channels, 1, 1, 1), stride=2, groups=channels)


class Embedding(nn.Module):
    """Features of images, and one logit each of how real they are, out of their high bands.

    Eight convolutions. The released network has batch norms between them, whose statistics two
    networks in training would share by turns; there are none here, and the logit is that of a mean
    over positions, so that images may have any size.

    Source: P31, with the widths, strides and features of its released code.
    """

    def __init__(self, channels: int, width: int) -> None:
        """
        Args:
            channels: of an image.
            width: channels of the first convolution; the paper has 64.
        """
        super().__init__()
        sizes = [3 * channels, *(width * k for k in WIDTHS)]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 + number % 2, padding=1)
            for number, (a, b) in enumerate(pairwise(sizes))
        )
        self.last = nn.Linear(sizes[-1], 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (batch,) and features (batch, channels, height, width) of images, coarser ones
        later."""
        h = high_bands(images.to(self.last.weight.dtype))
        features = []
        for number, conv in enumerate(self.convs):
            h = F.leaky_relu(conv(h), SLOPE)
            if number in FEATURES:
                features.append(h)
        logits: Tensor = self.last(h.mean((2, 3)))
        return logits[:, 0], features
