"""Random views of images in the making: a crop whose size follows a curriculum, a flip, a shift."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.synthesis.options import SynthesisOptions

Curriculum = Literal["step", "linear", "cosine"]
RATIOS = (3 / 4, 4 / 3)
"""Least and largest width of a crop divided by its height."""

TRIES = 10
"""Draws of a crop before the largest one of an allowed shape is taken, as torchvision does."""


def least_area(
    curriculum: Curriculum, iteration: int, iterations: int, milestone: float, last: float = 0.08
) -> float:
    """Least area of a crop in an iteration, as a share of the image.

    From 1 to `last` during the first `milestone` (share) of the iterations, `last` afterwards.

    Source: P25, whose `step` stays at 1 until the milestone.
    """
    end = milestone * iterations
    if iteration >= end:
        return last
    if curriculum == "step":
        return 1.0
    done = iteration / end
    share = 1 - done if curriculum == "linear" else (1 + math.cos(math.pi * done)) / 2
    return last + (1 - last) * share


def view(
    images: Tensor, low: float, options: SynthesisOptions, generator: torch.Generator
) -> Tensor:
    """One random view of all images of a batch, through which gradients flow.

    Args:
        images: (batch, channels, height, width).
        low: least area of the crop.
        options: `flip` and `jitter`.
        generator: of the draws, on the CPU.
    """
    height, width = images.shape[-2:]
    top, left, rows, columns = crop_box(height, width, low, generator)
    part = images[..., top : top + rows, left : left + columns]
    if (rows, columns) != (height, width):
        part = F.interpolate(
            part, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
    if options.flip and _draw(generator) < 0.5:
        part = part.flip(-1)
    most = jitter(options, height, width)
    shifts = torch.randint(0, most + 1, (2,), generator=generator).tolist()
    return part.roll(shifts, (-2, -1)) if any(shifts) else part


def jitter(options: SynthesisOptions, height: int, width: int) -> int:
    """Largest circular shift in pixels: the published 32 of 224 and 4 of 64, or as asked for."""
    if options.jitter is not None:
        return options.jitter
    side = min(height, width)
    return side // 7 if side >= 224 else side // 16


def crop_box(
    height: int, width: int, low: float, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a crop with an area of at least `low` of the image.

    The area is uniform in [low, 1], the logarithm of the ratio of its sides uniform.

    Source: torchvision's `RandomResizedCrop`, which the papers' code uses.
    """
    logs = [math.log(ratio) for ratio in RATIOS]
    for _ in range(TRIES):
        area = height * width * (low + (1 - low) * _draw(generator))
        ratio = math.exp(logs[0] + (logs[1] - logs[0]) * _draw(generator))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(torch.randint(0, height - rows + 1, (), generator=generator))
            left = int(torch.randint(0, width - columns + 1, (), generator=generator))
            return top, left, rows, columns
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    rows = min(height, round(width / ratio))
    columns = min(width, round(rows * ratio))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
