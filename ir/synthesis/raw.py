"""P68: an RGB image becomes what a camera's sensor would have seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAMMA = 2.2
TINY = 1e-8
"""Least value under a power: its gradient at 0 is no number."""

# sRGB's primaries in XYZ (D65), and XYZ in the colours of four sensors (the matrices that raw
# converters carry for them).
_FROM_SRGB = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_SENSORS = (
    ((1.0234, -0.2969, -0.2266), (-0.5625, 1.6328, -0.0469), (-0.0703, 0.2188, 0.6406)),
    ((0.4913, -0.0541, -0.0202), (-0.6130, 1.3513, 0.2906), (-0.1564, 0.2151, 0.7183)),
    ((0.8380, -0.2630, -0.0639), (-0.2887, 1.0725, 0.2496), (-0.0627, 0.1427, 0.5438)),
    ((0.6596, -0.2079, -0.0562), (-0.4782, 1.3016, 0.1933), (-0.0970, 0.1581, 0.5181)),
)
_GAINS = ((1.9, 1.0, 1.9), (2.4, 1.0, 1.5), (1.9, 1.0, 1.5), (2.4, 1.0, 1.9))


class Camera(NamedTuple):
    """The parameters of one shot.

    Attributes:
        colours: (3, 3), linear sRGB to the sensor's colours; every row sums to 1.
        gains: (3,), white balance: what the sensor's colours are multiplied with afterwards.
    """

    colours: Tensor
    gains: Tensor


def atoms() -> tuple[Tensor, Tensor]:
    """The dictionaries that a camera is mixed from: matrices (n, 3, 3), gains (n, 3), float64."""
    to_xyz = torch.tensor(_FROM_SRGB, dtype=torch.float64)
    matrices = torch.tensor(_SENSORS, dtype=torch.float64) @ to_xyz
    return matrices / matrices.sum(-1, keepdim=True), torch.tensor(_GAINS, dtype=torch.float64)


def mixed(colour_weights: Tensor, gain_weights: Tensor) -> Camera:
    """The camera C = sum w_i C_i, g = sum v_i g_i, of weights (n,) that are shares.

    Source: P68, whose weights are predicted from the image, and whose atoms are learned.
    """
    matrices, gains = atoms()
    return Camera((colour_weights.view(-1, 1, 1) * matrices).sum(0),
                  (gain_weights.view(-1, 1) * gains).sum(0))  # fmt: skip


def drawn_camera(generator: torch.Generator) -> Camera:
    """A camera of random weights: the softmax of normal numbers, twice."""
    weights = torch.randn(2, len(_SENSORS), generator=generator, dtype=torch.float64).softmax(-1)
    return mixed(weights[0], weights[1])


def to_raw(images: Tensor, camera: Camera) -> Tensor:
    """The sensor's colours, before the mosaic, in [0, 1].

    Inverse tone curve, gamma expansion, colour matrix, inverse gains.

    Args:
        images: (batch, 3, height, width), sRGB in [0, 1].
        camera: of all of them.
    """
    linear = inverse_tone(images.clamp(0, 1)).clamp_min(TINY) ** GAMMA
    seen = torch.einsum("ij,bjhw->bihw", camera.colours.to(images), linear)
    return (seen / camera.gains.to(images).view(-1, 1, 1)).clamp(0, 1)


def inverse_tone(values: Tensor) -> Tensor:
    """The inverse of 3 x^2 - 2 x^3 on [0, 1]: 0.5 - sin(asin(1 - 2 x) / 3)."""
    return 0.5 - torch.sin(torch.asin(1 - 2 * values) / 3)


def mosaic(images: Tensor, channels: int) -> Tensor:
    """What a Bayer sensor keeps of (batch, 3, height, width): red, green, green, blue.

    Args:
        images: of even sizes.
        channels: 4 packs the pattern, (batch, 4, height / 2, width / 2); 1 leaves it in its place,
            (batch, 1, height, width).
    """
    red, green, blue = images.unbind(1)
    places = ((red, 0, 0), (green, 0, 1), (green, 1, 0), (blue, 1, 1))
    if channels == 4:
        return torch.stack([plane[:, i::2, j::2] for plane, i, j in places], 1)
    result = torch.empty_like(red)
    for plane, i, j in places:
        result[:, i::2, j::2] = plane[:, i::2, j::2]
    return result.unsqueeze(1)
