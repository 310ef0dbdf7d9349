"""The scale affine layer of P76: a scale and a shift for every value, computed from the map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""Pointwise convolutions by the axes of what they read."""


class ScaleAffine(nn.Module):
    """x (B, C, ...) to x (1 + s) + t, with s and t from two pointwise convolutions on x.

    The second convolution starts at zero, where the layer is the identity.

    Args:
        channels: C.
        axes: of x: 3, 4 or 5.
    """

    def __init__(self, channels: int, axes: int = 4) -> None:
        super().__init__()
        kind = CONVOLUTIONS[axes]
        self.reads = kind(channels, channels, 1)
        self.affine = kind(channels, 2 * channels, 1)
        with torch.no_grad():
            self.affine.weight.zero_()
            assert self.affine.bias is not None
            self.affine.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(F.gelu(self.reads(x))).chunk(2, dim=1)
        result: Tensor = x * (1 + scale) + shift
        return result
