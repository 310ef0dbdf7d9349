"""Low-pass images of a Haar wavelet transform, as one fixed convolution a level."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def haar_kernels(halved: tuple[bool, ...], bands: int) -> Tensor:
    """(bands, 1, ...) kernels of one level; the first is the low-pass, 1 / sqrt(2) per axis.

    Args:
        halved: the axes that this level halves.
        bands: 1, or as many as there are combinations of low and high pass.
    """
    r = 1 / math.sqrt(2)
    passes = {True: torch.tensor([[r, r], [r, -r]]), False: torch.ones(1, 1)}
    made = []
    for choice in itertools.product(*(range(2 if axis else 1) for axis in halved)):
        kernel = torch.ones([1] * len(halved))
        for axis, (is_halved, band) in enumerate(zip(halved, choice, strict=True)):
            shape = [1] * len(halved)
            shape[axis] = -1
            kernel = kernel * passes[is_halved][band].view(shape)
        made.append(kernel)
    return torch.stack(made[:bands]).unsqueeze(1)


class HaarInput(nn.Module):
    """An image (B, C, ...) to `out` channels at a lower resolution: Haar bands, then one block.

    Bands of the last level (all, or the low-pass alone) follow from the low-pass images of those
    before it; a convolution, an instance norm and a leaky ReLU lift them.

    Args:
        channels: C.
        halvings: of every axis.
        out: channels of the result.
        all_bands: give all bands of the last level, and not its low-pass alone.
        round_up: an odd length is halved upwards, its last value counting twice; else downwards.
    """

    def __init__(
        self, channels: int, halvings: tuple[int, ...], out: int, all_bands: bool = False,
        round_up: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, axes, levels = channels, len(halvings), max(halvings)
        self.round_up = round_up
        self.steps = []
        bands = 1
        for level in range(levels):
            # an axis that is halved less often is left alone at first
            halved = tuple(times >= levels - level for times in halvings)
            is_last = level == levels - 1
            bands = 2 ** sum(halved) if is_last and all_bands else 1
            kernels = haar_kernels(halved, bands).repeat(channels, *[1] * (axes + 1))
            self.register_buffer(f"level{level}", kernels)
            self.steps.append([2 if axis else 1 for axis in halved])
        self.lift = nn.Sequential(
            CONVOLUTIONS[axes](channels * bands, out, 3, padding=1),
            NORMS[axes](out, affine=True),
            nn.LeakyReLU(0.01),
        )

    def low_pass(self, image: Tensor) -> Tensor:
        """The bands alone."""
        for level, steps in enumerate(self.steps):
            kernels = getattr(self, f"level{level}").to(image.dtype)
            convolve = CONVOLVE[len(steps)]
            if self.round_up:
                ends = [width for step in reversed(steps) for width in (0, step - 1)]
                image = F.pad(image, ends, mode="replicate")
            image = convolve(image, kernels, stride=steps, groups=self.channels)
        return image

    def forward(self, image: Tensor) -> Tensor:
        lifted: Tensor = self.lift(self.low_pass(image))
        return lifted
