"""A convolution as a map between two tensors of a graph, and what further operators make of it.

Along every axis, place p of the result reads the places `stride * p + offset` of the input, for
every offset in a list; input places that do not exist read zero. All arithmetic is in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Sizes = tuple[int, ...]
T = TypeVar("T")


class NotFoldable(Exception):
    """Why what an operator makes of a convolution is not one."""


@dataclass(frozen=True)
class Convolved:
    """y = bias + sum over offsets of kernel . x, between tensors (batch, channels, *axes).

    Attributes:
        kernel: (out, in / groups, *number of offsets) float64.
        bias: (out,) float64.
        groups: of channels.
        stride: along every axis.
        offsets: along every axis, rising.
        reach: along every axis the result has (length + reach) // stride + 1 places.
        keeps: along every axis, whether the formula gives just the bias beyond the result's
            ends: then a border of that value continues it.
        foreign: along every axis, places at both ends that do not follow the formula.
    """

    kernel: Tensor
    bias: Tensor
    groups: int
    stride: Sizes
    offsets: tuple[Sizes, ...]
    reach: Sizes
    keeps: tuple[bool, ...]
    foreign: tuple[tuple[int, int], ...]

    @classmethod
    def identity(cls, channels: int, axes: int) -> Convolved:
        """x itself."""
        kernel = torch.ones(channels, 1, *[1] * axes, dtype=torch.float64)
        bias = torch.zeros(channels, dtype=torch.float64)
        return cls(kernel, bias, channels, (1,) * axes, ((0,),) * axes, (-1,) * axes,
                   (True,) * axes, ((0, 0),) * axes)  # fmt: skip

    @property
    def axes(self) -> int:
        """Number of spatial axes; 0 for a linear layer."""
        return len(self.stride)

    @property
    def is_whole(self) -> bool:
        """Whether every place follows the formula."""
        return all(ends == (0, 0) for ends in self.foreign)

    def scaled(self, scale: Tensor, shift: Tensor) -> Convolved:
        """y * scale + shift, each (out,)."""
        wide = scale.view(-1, *[1] * (self.kernel.dim() - 1))
        return replace(self, kernel=self.kernel * wide, bias=self.bias * scale + shift)

    def padded(
        self, axis: int, ends: tuple[int, int], value: Tensor, tolerance: float = 1e-12
    ) -> Convolved:
        """With `ends` places of `value` (out,) more on an axis.

        Where that is not what the formula gives there, up to a tolerance for rounding, the places
        are foreign.
        """
        before = self.foreign[axis]
        if any(there and more for there, more in zip(before, ends, strict=True)):
            raise NotFoldable("pads an end that was padded with another value")
        moved = self._moved(axis, ends)
        if self.keeps[axis] and torch.allclose(value, self.bias, rtol=0, atol=tolerance):
            return moved
        both = (before[0] + ends[0], before[1] + ends[1])
        return replace(moved, foreign=_with(self.foreign, axis, both))

    def cropped(self, axis: int, ends: tuple[int, int]) -> Convolved:
        """Without `ends` places of an axis."""
        moved = self._moved(axis, (-ends[0], -ends[1]))
        own = [cut - there for cut, there in zip(ends, self.foreign[axis], strict=True)]
        left = (max(0, -own[0]), max(0, -own[1]))
        keeps = self.keeps[axis] and max(own) <= 0
        return replace(moved, keeps=_with(self.keeps, axis, keeps),
                       foreign=_with(self.foreign, axis, left))  # fmt: skip

    def _moved(self, axis: int, ends: tuple[int, int]) -> Convolved:
        stride = self.stride[axis]
        offsets = tuple(o - stride * ends[0] for o in self.offsets[axis])
        reach = self.reach[axis] + stride * sum(ends)
        return replace(self, offsets=_with(self.offsets, axis, offsets),
                       reach=_with(self.reach, axis, reach))  # fmt: skip

    def convolved(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sizes,
        padding: Sequence[tuple[int, int]],
        dilation: Sizes,
        groups: int,
    ) -> Convolved:
        """A convolution (out, m / groups, *taps) of y, which pads y with zeros."""
        first = self
        for axis, ends in enumerate(padding):
            if ends != (0, 0):
                first = first.padded(axis, ends, torch.zeros_like(self.bias))
        if not first.is_whole:
            raise NotFoldable("pads with zeros what is not zero beyond its ends")
        common = math.gcd(first.groups, groups)
        one = _regrouped(first.kernel, first.groups, common)
        two = _regrouped(weight.double(), groups, common)
        taps = weight.shape[2:]
        steps = [tuple(d * t for t in range(n)) for d, n in zip(dilation, taps, strict=True)]
        offsets = tuple(
            tuple(sorted({o + s * t for o in own for t in more}))
            for own, s, more in zip(first.offsets, first.stride, steps, strict=True)
        )
        a, b = (_blocks(k, common) for k in (one, two))
        made = one.new_zeros(common, b.shape[1], a.shape[2], *(len(o) for o in offsets))
        for tap in itertools.product(*(range(n) for n in taps)):
            at: Any = (..., *tap)
            part = torch.einsum("gom,gmi...->goi...", b[at], a)
            moved = [tuple(o + s * more[t] for o in own) for own, s, more, t in
                     zip(first.offsets, first.stride, steps, tap, strict=True)]  # fmt: skip
            made[(slice(None),) * 3 + _grid(offsets, moved)] += part
        summed = _blocks(two, common).flatten(3).sum(3) if taps else b
        moved_bias = torch.einsum("gom,gm->go", summed, first.bias.view(common, -1)).reshape(-1)
        new_bias = moved_bias if bias is None else moved_bias + bias.double()
        span = [more[-1] for more in steps]
        return Convolved(
            made.reshape(-1, *made.shape[2:]),
            new_bias,
            common,
            tuple(s * t for s, t in zip(first.stride, stride, strict=True)),
            offsets,
            tuple(r - s * n for r, s, n in zip(first.reach, first.stride, span, strict=True)),
            tuple(k and n == 1 for k, n in zip(first.keeps, taps, strict=True)),
            ((0, 0),) * self.axes,
        )

    def plus(self, other: Convolved, factor: float = 1.0) -> Convolved:
        """y + factor * the other's result."""
        one, two = self._beside(other)
        return replace(one, kernel=one.kernel + factor * two.kernel,
                       bias=one.bias + factor * two.bias)  # fmt: skip

    def joined(self, other: Convolved) -> Convolved:
        """The channels of both, one behind the other."""
        one, two = (replace(m, kernel=_regrouped(m.kernel, m.groups, 1), groups=1)
                    for m in (self, other))  # fmt: skip
        one, two = one._beside(two, channels=False)
        return replace(one, kernel=torch.cat([one.kernel, two.kernel]),
                       bias=torch.cat([one.bias, two.bias]))  # fmt: skip

    def _beside(self, other: Convolved, channels: bool = True) -> tuple[Convolved, Convolved]:
        """Both with the same groups and offsets."""
        if not (self.is_whole and other.is_whole):
            raise NotFoldable("reads a border that does not follow from the input")
        if self.stride != other.stride:
            raise NotFoldable(f"strides {self.stride} and {other.stride} differ")
        if self.reach != other.reach:
            raise NotFoldable("the results of its operands end at different places")
        if channels and len(self.bias) != len(other.bias):
            raise NotFoldable("its operands have different numbers of channels")
        common = math.gcd(self.groups, other.groups)
        offsets = tuple(
            tuple(sorted({*a, *b})) for a, b in zip(self.offsets, other.offsets, strict=True)
        )
        keeps = tuple(a and b for a, b in zip(self.keeps, other.keeps, strict=True))
        one, two = (
            replace(m, kernel=_spread(_regrouped(m.kernel, m.groups, common), m.offsets, offsets),
                    groups=common, offsets=offsets, keeps=keeps)
            for m in (self, other)
        )  # fmt: skip
        return one, two

    def places(self, stride: Sizes) -> float:
        """Places of y for every place of a tensor with the given stride to the same input."""
        return math.prod(b / a for a, b in zip(self.stride, stride, strict=True))


def _with(values: Sequence[T], place: int, value: T) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _regrouped(kernel: Tensor, groups: int, fewer: int) -> Tensor:
    """The kernel of a grouped convolution with fewer groups, zero between what was apart."""
    if groups == fewer:
        return kernel
    out, width = kernel.shape[0] // groups, kernel.shape[1]
    parts = kernel.view(fewer, groups // fewer, out, width, *kernel.shape[2:])
    made = kernel.new_zeros(fewer, groups // fewer, out, groups // fewer, width, *kernel.shape[2:])
    for number in range(groups // fewer):
        made[:, number, :, number] = parts[:, number]
    return made.reshape(kernel.shape[0], -1, *kernel.shape[2:])


def _blocks(kernel: Tensor, groups: int) -> Tensor:
    return kernel.view(groups, kernel.shape[0] // groups, *kernel.shape[1:])


def _spread(kernel: Tensor, own: tuple[Sizes, ...], offsets: tuple[Sizes, ...]) -> Tensor:
    if own == offsets:
        return kernel
    made = kernel.new_zeros(*kernel.shape[:2], *(len(o) for o in offsets))
    made[(slice(None),) * 2 + _grid(offsets, own)] = kernel
    return made


def _grid(offsets: tuple[Sizes, ...], wanted: Sequence[Sizes]) -> tuple[Tensor, ...]:
    """Indices of wanted offsets among all, as an open grid."""
    axes = len(offsets)
    found = []
    for axis, (every, some) in enumerate(zip(offsets, wanted, strict=True)):
        places = torch.tensor([every.index(o) for o in some])
        found.append(places.view(*[1] * axis, -1, *[1] * (axes - axis - 1)))
    return tuple(found)
