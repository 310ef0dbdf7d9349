"""Splits a kernel into branches that sum to it: each gets a share of the taps that it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class Geometry:
    """Of the convolution that is split."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Part:
    """One branch: a convolution, perhaps with a 1x1 one in front, or a pooling behind a 1x1 one.

    Attributes:
        weight: (out, in / groups, *kernel) of its convolution; None for an identity and a pooling.
        padding: of its convolution or pooling.
        first: (m, in / groups, 1, ..) of a 1x1 convolution in front.
        pool: sides of an average pooling behind it.
        scale: (channels,) that an identity is multiplied by.
    """

    weight: Tensor | None
    padding: tuple[int, ...]
    first: Tensor | None = None
    pool: tuple[int, ...] = ()
    scale: Tensor | None = None

    def result(self, x: Tensor, own: Geometry) -> Tensor:
        """What the branch gives, without the scale of an identity."""
        axes = len(own.stride)
        if self.first is not None:
            x = PLAIN[axes](x, self.first.to(x.dtype), groups=own.groups)
        if self.pool:
            return POOLS[axes](x, self.pool, own.stride, self.padding)
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)
        return PLAIN[axes](x, weight, None, own.stride, self.padding, own.dilation, own.groups)


def centre(kernel: Sequence[int], own: Geometry) -> tuple[int, ...] | None:
    """The tap that reads the result's own place; None where no tap does."""
    found = []
    for size, padding, dilation in zip(kernel, own.padding, own.dilation, strict=True):
        if padding % dilation or padding // dilation >= size:
            return None
        found.append(padding // dilation)
    return tuple(found)


def _tap(kernel: Tensor, at: tuple[int, ...]) -> Tensor:
    """A view of one tap, (out, in / groups)."""
    for place in reversed(at):
        kernel = kernel[..., place]
    return kernel


def repvgg(weight: Tensor, at: tuple[int, ...], own: Geometry) -> list[Part]:
    """The kernel, a 1x1 kernel, and where channels and places agree an identity.

    Args:
        weight: (out, in / groups, *kernel) float64.
        at: the tap that reads the result's own place.
        own: of the convolution.
    """
    rest, zero = weight.clone(), (0,) * len(at)
    parts = []
    tap = _tap(rest, at)
    if weight.shape[0] == weight.shape[1] * own.groups and all(s == 1 for s in own.stride):
        rows = torch.arange(weight.shape[0])
        columns = rows % weight.shape[1]
        scale = tap[rows, columns] / 3
        tap[rows, columns] -= scale
        parts.append(Part(None, zero, scale=scale))
    point = tap / 2
    tap -= point
    parts.insert(0, Part(point.reshape(*point.shape, *[1] * len(at)), zero))
    return [Part(rest, own.padding), *parts]


def mobileone(
    weight: Tensor, at: tuple[int, ...], own: Geometry, copies: int, generator: torch.Generator
) -> list[Part]:
    """As RepVGG's, the kernel in several copies that differ by noise summing to zero.

    Equal copies would have equal gradients and stay equal: the noise has a tenth of the kernel's
    standard deviation.
    """
    if math.prod(weight.shape[2:]) == 1:
        first, others = Part(weight, own.padding), []
    else:
        first, *others = repvgg(weight, at, own)
    assert first.weight is not None
    noise = torch.randn(copies, *weight.shape, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean(0)) * 0.1 * weight.std(unbiased=False)
    return [*(Part(first.weight / copies + n, own.padding) for n in noise), *others]


def acnet(weight: Tensor, at: tuple[int, ...], own: Geometry) -> list[Part]:
    """The kernel and, for every axis, a strip along it through the centre."""
    rest = weight.clone()
    strips = []
    for axis in range(len(at)):
        index = tuple(slice(None) if n == axis else slice(c, c + 1) for n, c in enumerate(at))
        strip = rest[(slice(None), slice(None), *index)] / 2
        rest[(slice(None), slice(None), *index)] -= strip
        padding = tuple(p if n == axis else 0 for n, p in enumerate(own.padding))
        strips.append(Part(strip, padding))
    return [Part(rest, own.padding), *strips]


def dbb(weight: Tensor, at: tuple[int, ...], own: Geometry) -> list[Part]:
    """The kernel, a 1x1 kernel, a 1x1 kernel in front of a kernel, and one in front of a pooling.

    The pooling takes what all taps have in common; it needs a kernel without dilation.
    """
    axes, rest = len(at), weight.clone()
    tap = _tap(rest, at)
    point = tap / 2
    tap -= point
    parts = [Part(point.reshape(*point.shape, *[1] * axes), (0,) * axes)]
    width = weight.shape[1]
    channels = torch.arange(width * own.groups)
    same = weight.new_zeros(len(channels), width, *[1] * axes)
    same[channels, channels % width] = 1.0
    parts.append(Part(rest / 2, own.padding, first=same))
    rest = rest / 2
    if all(d == 1 for d in own.dilation):
        mean = rest.flatten(2).mean(2).view(*rest.shape[:2], *[1] * axes) / 2
        rest = rest - mean
        taps = tuple(weight.shape[2:])
        parts.append(Part(None, own.padding, first=mean * math.prod(taps), pool=taps))
    return [Part(rest, own.padding), *parts]
