"""A small synthesizer (P62) and a small codec with transforms that follow regions (P76)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.modules.ddsp import FilteredNoise, FirReverb, Harmonic
from graphwright.ir.modules.scale_affine import ScaleAffine


class Synthesizer(nn.Module):
    """Pitch and loudness to sound: sines and filtered noise in a room, led by a recurrent net.

    frequency (B, F, 1) in Hz, loudness (B, F, 1), noise (B, 16 F) in [-1, 1) to audio (B, 16 F).
    """

    def __init__(self, harmonics: int = 6, bands: int = 9, hop: int = 16, width: int = 12) -> None:
        super().__init__()
        self.enter = nn.Linear(2, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.sizes = (1, harmonics, bands)
        self.controls = nn.Linear(width, sum(self.sizes))
        self.sines, self.noise = Harmonic(harmonics, hop), FilteredNoise(bands, hop)
        self.room = FirReverb(40)

    def forward(self, frequency: Tensor, loudness: Tensor, noise: Tensor) -> Tensor:
        h = F.leaky_relu(self.enter(torch.cat([(frequency / 440).log2(), loudness], -1)))
        amplitude, shares, magnitudes = self.controls(self.memory(h)[0]).split(self.sizes, -1)
        dry = self.sines(frequency, amplitude, shares) + self.noise(magnitudes, noise)
        return self.room(dry)


class DivisorNorm(nn.Module):
    """x / sqrt(b + sum_j g_ij x_j^2) over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(channels))
        self.mixing = nn.Parameter(0.1 * torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.mixing.abs()[:, :, None, None]
        return x * torch.rsqrt(F.conv2d(x * x, kernel, self.offset.abs() + 1e-3))


def region_means(x: Tensor, regions: Tensor, count: int) -> Tensor:
    """Mean of x (B, C, H, W) over every region of a map (B, H, W): (B, count, C)."""
    own = F.one_hot(regions, count).to(x.dtype).flatten(1, 2)
    sums = torch.einsum("bpr,bcp->brc", own, x.flatten(2))
    return sums / (own.sum(1)[..., None] + 5e-4)


def spread(means: Tensor, regions: Tensor) -> Tensor:
    """Every pixel's mean (B, C, H, W), of the means (B, R, C) and a map (B, H, W)."""
    own = F.one_hot(regions, means.shape[1]).to(means.dtype)
    return torch.einsum("bhwr,brc->bchw", own, means)


class RegionTransform(nn.Module):
    """A 3 x 3 filter of its own for every pixel, made of its value and its region's mean."""

    def __init__(self, channels: int, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.1),
                                   nn.Conv2d(width, width, 1))  # fmt: skip
        self.kernels = nn.Sequential(
            nn.Conv2d(width + channels, width, 1), nn.LeakyReLU(0.1),
            nn.Conv2d(width, 9 * width, 3, padding=1), nn.LeakyReLU(0.1),
            nn.Conv2d(9 * width, 9 * width, 3, padding=1, groups=9 * width),
        )  # fmt: skip
        self.gate = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1),
                                  nn.Conv2d(width, width, 1))  # fmt: skip
        self.leave = nn.Conv2d(width, channels, 1)

    def filtered(self, x: Tensor, kernels: Tensor) -> Tensor:
        """x (B, C, H, W) by kernels (B, 9 C, H, W), nine in a row for each channel."""
        around = F.unfold(x, 3, padding=1).unflatten(1, (x.shape[1], 9))
        return (around * kernels.flatten(2).unflatten(1, (x.shape[1], 9))).sum(2).reshape(x.shape)

    def forward(self, x: Tensor, means: Tensor) -> Tensor:
        h = self.enter(x)
        y = self.filtered(h, self.kernels(torch.cat([h, means], 1)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return x + self.leave(y)


class RegionCodec(nn.Module):
    """Images (B, 3, H, W) to what is decoded from whole numbers, and these numbers.

    Without a map of regions, as in use, the regions are the cells of a grid, 4 x 4.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 5, 2, 2), nn.Conv2d(width, width, 5, 2, 2)
        self.norms = nn.ModuleList(DivisorNorm(width) for _ in range(3))
        self.affine, self.back = ScaleAffine(width), ScaleAffine(width)
        self.pack, self.unpack = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.encode, self.decode = RegionTransform(width), RegionTransform(width)
        self.median = nn.Parameter(0.1 * torch.ones(1, 4, 1, 1))
        self.up = nn.ConvTranspose2d(width, width, 5, 2, 2, 1)
        self.last = nn.ConvTranspose2d(width, 3, 5, 2, 2, 1)

    def means(self, h: Tensor) -> Tensor:
        """Means of the cells as they are stored, at every pixel."""
        packed = self.pack(F.adaptive_avg_pool2d(h, 4)) - self.median
        kept = self.unpack(torch.round(8 * packed) / 8 + self.median)
        return F.interpolate(kept, size=h.shape[-2:], mode="nearest")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.affine(self.norms[0](self.first(x)))
        h = self.norms[1](self.second(h))
        means = self.means(h)
        codes = torch.round(8 * self.encode(h, means))
        h = self.decode(codes / 8, means)
        h = self.norms[2](self.up(self.back(h)))
        return self.last(h), codes
