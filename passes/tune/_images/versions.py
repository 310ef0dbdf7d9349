"""Versions of images: sharper ones, and blurred ones with noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 11
"""Pixels on a side of the largest blur."""

GAUSSIAN = 0.65
"""Share of the blurs that are Gaussian; the others are motion along a line."""

Range = tuple[float, float]


def sharpened(images: Tensor, factors: Tensor, bounds: Range) -> Tensor:
    """s + f (x - s), with s the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13.

    A factor of 1 leaves the image as it is, one below softens. The edge of an image stays.

    Args:
        images: (batch, channels, height, width).
        factors: (batch,).
        bounds: least and largest pixel value.
    """
    kernel = images.new_ones(3, 3)
    kernel[1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = _filtered(images, (kernel / 13).expand(len(images), 3, 3), 0)
    made = smooth + factors.to(images)[:, None, None, None] * (images - smooth)
    return made.clamp(*bounds)


def degraded(images: Tensor, bounds: Range) -> Tensor:
    """Every image blurred in a way of its own, and with noise of a strength of its own.

    The noise's deviation is 1 to 14 where pixels go from 0 to 255.

    Args:
        images: (batch, channels, height, width).
        bounds: least and largest pixel value.
    """
    kernels = torch.stack([_drawn_kernel() for _ in range(len(images))]).to(images)
    strength = torch.randint(1, 15, (len(images), 1, 1, 1)) * ((bounds[1] - bounds[0]) / 255)
    noise = torch.randn(images.shape) * strength
    return (_filtered(images, kernels, LARGEST // 2) + noise.to(images)).clamp(*bounds)


def gaussian(side: int, sigma: float) -> Tensor:
    """(LARGEST, LARGEST) blur of a side, with zeros around it."""
    along = torch.arange(LARGEST) - LARGEST // 2
    weights = torch.exp(-along.double().square() / (2 * sigma**2)) * (along.abs() <= side // 2)
    weights = weights / weights.sum()
    return torch.outer(weights, weights)


def motion(length: int, angle: float) -> Tensor:
    """(LARGEST, LARGEST) blur along a line through the middle.

    Args:
        length: pixels, odd.
        angle: in radians.
    """
    kernel = torch.zeros(LARGEST, LARGEST, dtype=torch.float64)
    for place in range(-(length // 2), length // 2 + 1):
        row = round(place * math.sin(angle)) + LARGEST // 2
        column = round(place * math.cos(angle)) + LARGEST // 2
        kernel[row, column] += 1
    return kernel / length


def _drawn_kernel() -> Tensor:
    """Sides 3 to 11, deviations 2 to 10, any angle."""
    is_gaussian, turn = torch.rand(2, dtype=torch.float64).tolist()
    side = 2 * int(torch.randint(1, 6, ())) + 1
    if is_gaussian < GAUSSIAN:
        return gaussian(side, float(torch.randint(2, 11, ())))
    return motion(side, math.pi * turn)


def _filtered(images: Tensor, kernels: Tensor, padding: int) -> Tensor:
    """Every image under its own kernel; what lies beyond an edge is the edge."""
    batch, channels = images.shape[:2]
    whole = F.pad(images, [padding] * 4, mode="replicate").flatten(0, 1)[None]
    weight = kernels.repeat_interleave(channels, 0)[:, None]
    filtered = F.conv2d(whole, weight, groups=batch * channels)[0]
    found: Tensor = filtered.unflatten(0, (batch, channels))
    return found
