"""P52: a frame taken by day becomes one taken at night, under several lights and with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.synthesis.options import ShiftOptions

AMBIENT = 0.05
"""What the first light, which is everywhere, leaves of the image."""

FLOOR = 1e-7
"""Least weight of a light."""

GLARE = 50.0
"""Least brightness of a saturated light; the largest is twice that."""


def relit(images: Tensor, options: ShiftOptions, generator: torch.Generator) -> Tensor:
    """Images under night lights.

    Dimmed by U(dim); light i makes clip(image * colour_i, 0, 1), the first one with mask 1 and 0.05
    of its brightness, the others with Gaussian masks of their own; their average, weighted by the
    masks; to it (50 + 50 u) * mask * image of every saturated light is added, clipped at 1.

    Args:
        images: (batch, channels, height, width) in [0, 1], linear; red, green, blue, or red, green,
            green, blue of a packed Bayer pattern.
        options: `lights` (the ambient one counts; without any, images are only dimmed), `saturated`
            and `night_mean`, `night_std` of their colours.
        generator: of the draws, on the CPU.

    Source: P52. Saturated lights are in its code alone. The fitted Gaussian of night colours is its
    authors' camera's; ours is a plain one, to be set for another camera.
    """
    return torch.cat([_relit(image[None], options, generator) for image in images])


def _relit(image: Tensor, options: ShiftOptions, generator: torch.Generator) -> Tensor:
    low, high = options.dim
    image = image * (low + (high - low) * _uniform(generator))
    if not options.lights and not options.saturated:
        return image
    height, width = image.shape[-2:]
    total, weights = torch.zeros_like(image), torch.zeros_like(image)
    for index in range(options.lights):
        scale = AMBIENT if index == 0 else 1.0
        mask = torch.ones(height, width) if index == 0 else spot(height, width, 1.0, generator)
        lit = (image * _colour(image, options, generator) * scale).clamp(0, 1)
        mask = mask.to(image)
        total, weights = total + mask * lit, weights + mask
    result = total / weights if options.lights else image
    for _ in range(options.saturated):
        narrower = 5 + 5 * _uniform(generator)
        mask = spot(height, width, narrower, generator).to(image)
        lit = (image * _colour(image, options, generator)).clamp(0, 1)
        result = result + (GLARE + GLARE * _uniform(generator)) * mask * lit
    return result.clamp(max=1)


def spot(height: int, width: int, narrower: float, generator: torch.Generator) -> Tensor:
    """The mask of a light, (height, width): a Gaussian with a peak of 1, not below 1e-7.

    Its size is U(0.5, 1) of the image, by the rule of a Gaussian kernel of so many pixels (0.3 (k /
    2 - 1.5) + 0.8), divided by `narrower`; its middle is in the inner 0.8 of the image.
    """
    parts = []
    for side in (height, width):
        size = side * (0.5 + 0.5 * _uniform(generator))
        sigma = max(0.3 * ((size - 1) / 2 - 1) + 0.8, 0.3) / narrower
        middle = side * (0.1 + 0.8 * _uniform(generator))
        places = torch.arange(side, dtype=torch.float64) + 0.5
        parts.append(torch.exp(-(((places - middle) / sigma) ** 2) / 2))
    mask = parts[0][:, None] * parts[1][None]
    return (mask / mask.max().clamp_min(1e-300)).clamp_min(FLOOR)


def noisy(images: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
    """Images with Gaussian noise of variance `shot` * value + `read`, clipped to [0, 1].

    Source: P52's heteroscedastic model of a sensor.
    """
    drawn = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    spread = (shot * images.clamp_min(0) + read).clamp_min(0).sqrt()
    return (images + spread * drawn.to(images.device)).clamp(0, 1)


def noise_of_iso(iso: int) -> tuple[float, float]:
    """(shot, read) variance of a sensor at an ISO.

    Shot noise grows with the gain; read noise follows from it as in Brooks et al. 2019,
    "Unprocessing Images for Learned Raw Denoising": log read = 2.18 log shot + 1.20. P52's own
    splines are those of one phone.
    """
    shot = torch.tensor(2.5e-6 * iso, dtype=torch.float64)
    return float(shot), float(torch.exp(2.18 * torch.log(shot) + 1.20))


def _colour(image: Tensor, options: ShiftOptions, generator: torch.Generator) -> Tensor:
    """A night light, (channels, 1, 1)."""
    mean = torch.tensor(options.night_mean, dtype=torch.float64)
    std = torch.tensor(options.night_std, dtype=torch.float64)
    drawn = mean + std * torch.randn(3, generator=generator, dtype=torch.float64)
    places = [0, 1, 1, 2] if image.shape[1] == 4 else [0, 1, 2]
    return drawn.clamp_min(0)[places].to(image).view(-1, 1, 1)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
