"""Square patches of images, at random scales and turned in their place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def annealed(step: int, total: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at `total` and behind it."""
    share = min(1.0, step / total) if total else 1.0
    return start + (end - start) * share


def drawn_scales(count: int, least: float, beta: float) -> Tensor:
    """least + (1 - least) * Beta(1, beta), from torch's generator.

    A draw of Beta(1, b) is 1 - u^(1 / b), for u uniform.

    Args:
        count: how many.
        least: smallest scale.
        beta: second parameter; near 0 all scales are near 1.

    Returns:
        (count,).
    """
    uniform = torch.rand(count, dtype=torch.float64)
    return least + (1 - least) * (1 - uniform ** (1 / beta))


def sampled(images: Tensor, scale: Tensor, offset: Tensor, resolution: int) -> Tensor:
    """Patches of images, brought to one size by bilinear sampling.

    The first and the last sample of a row lie on the ends of the patch.

    Args:
        images: (batch, channels, side, side).
        scale: (batch,), side of a patch as a share of the image's.
        offset: (batch, 2), its left upper corner (right, down) as a share; scale + offset <= 1.
        resolution: samples in a row.

    Returns:
        (batch, channels, resolution, resolution).
    """
    along = torch.linspace(0, 2, resolution, dtype=torch.float64)
    axes = [along * scale[:, None] - 1 + 2 * offset[:, axis, None] for axis in (0, 1)]
    right = axes[0][:, None, :].expand(-1, resolution, -1)
    down = axes[1][:, :, None].expand(-1, -1, resolution)
    grid = torch.stack([right, down], -1).clamp(-1, 1).to(images)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=True)


def turned(images: Tensor, quarters: Tensor, side: int) -> Tensor:
    """Every patch turned by quarters of a circle in its place.

    Args:
        images: (batch, channels, height, width), multiples of `side`.
        quarters: (batch, height / side, width / side) whole numbers.
        side: pixels on a side of a patch.
    """
    parts = patches(images, side)
    turns = (quarters % 4)[:, None, :, :, None, None]
    found = parts
    for number in (1, 2, 3):
        found = torch.where(turns == number, parts.rot90(number, (-2, -1)), found)
    batch, channels, rows, columns = found.shape[:4]
    return found.transpose(3, 4).reshape(batch, channels, rows * side, columns * side)


def patches(images: Tensor, side: int) -> Tensor:
    """(batch, channels, height / side, width / side, side, side)."""
    batch, channels, height, width = images.shape
    shape = (batch, channels, height // side, side, width // side, side)
    return images.reshape(shape).transpose(3, 4)
