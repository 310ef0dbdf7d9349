"""Coordinates of the values of a tensor, and their encoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORM = 64.0
"""Unit of the absolute sizes among the coordinates."""


def coordinates(
    place: int,
    places: int,
    shape: Sequence[int],
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Coordinates of every pair of an output and an input channel of a tensor.

    Source: P48. Of [layer, output, input, layers, outputs, inputs], jittered in units of one
    index, the first three become relative positions and the last three sizes over `NORM`.

    Args:
        place: number of the tensor among all that are made.
        places: their number.
        shape: outputs, and inputs unless it is a vector; further dimensions are those of a kernel.
        noise: width of the uniform jitter.
        generator: of the jitter.

    Returns:
        (outputs * inputs, 6), float32.
    """
    outputs, inputs = shape[0], shape[1] if len(shape) > 1 else 1
    grid = torch.cartesian_prod(
        torch.arange(outputs, dtype=torch.float32), torch.arange(inputs, dtype=torch.float32)
    ).reshape(-1, 2)
    rows = len(grid)
    found = torch.empty(rows, 6)
    found[:, 0] = place
    found[:, 1:3] = grid
    found[:, 3:] = torch.tensor([places, outputs, inputs], dtype=torch.float32)
    if noise:
        found += (torch.rand(rows, 6, generator=generator) - 0.5) * noise
    return torch.cat([found[:, :3] / found[:, 3:], found[:, 3:] / NORM], 1)


def encode(points: Tensor, frequencies: int) -> Tensor:
    """The coordinates, and sine and cosine of them at doubling frequencies.

    Args:
        points: (rows, dimensions).
        frequencies: F; the highest is 2^(F-1) pi.

    Returns:
        (rows, dimensions * (1 + 2 F)).
    """
    factors = math.pi * 2.0 ** torch.arange(frequencies, dtype=points.dtype, device=points.device)
    angles = (points[:, None, :] * factors[:, None]).flatten(1)
    return torch.cat([points, angles.sin(), angles.cos()], 1)
