"""Transposed convolutions as plain ones: one convolution gives all places of a stride at once.

With stride s, the results at places of one remainder mod s are a convolution of the input by every
s-th weight. Side by side as channels they are one convolution with s * s times the channels; moved
to where they belong (`pixel_shuffle`) and cut, they are the transposed convolution's result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

OPERATOR = torch.ops.aten.conv_transpose2d.input
DEFAULTS = (None, None, None, 1, 0, 0, 1, 1)
"""x, weight, bias, stride, padding, output_padding, groups, dilation."""


@dataclass(frozen=True)
class SubPixel:
    """A transposed convolution in two dimensions as a plain one.

    Attributes:
        stride: along both.
        taps: places of the plain convolution's window, along each.
        begin, end: results to cut off on each side of each dimension.
    """

    stride: int
    taps: tuple[int, int]
    begin: tuple[int, int]
    end: tuple[int, int]

    def weight(self, weight: Tensor) -> Tensor:
        """(in, out, h, w) as (out * stride * stride, in, *taps)."""
        s, (rows, columns) = self.stride, self.taps
        full = weight.new_zeros(*weight.shape[:2], rows * s, columns * s)
        full[..., : weight.shape[2], : weight.shape[3]] = weight
        apart = full.reshape(*weight.shape[:2], rows, s, columns, s).flip(2, 4)
        turned = apart.permute(1, 3, 5, 0, 2, 4)
        return turned.reshape(-1, weight.shape[0], rows, columns).contiguous()

    def channels(self, values: Tensor) -> Tensor:
        """(out,) as (out * stride * stride,)."""
        return values.repeat_interleave(self.stride**2)


def sub_pixel(node: fx.Node) -> SubPixel | None:
    """The plain convolution behind a transposed one; None where it has no such form.

    It has one in two dimensions, with one group, one stride for both and no dilation.
    """
    if node.target is not OPERATOR or node.kwargs:
        return None
    given: tuple[Any, ...] = (*node.args, *DEFAULTS[len(node.args) :])
    weight, (stride, padding, extra, groups, dilation) = given[1], given[3:]
    strides, pads, extras, dilations = (_both(v) for v in (stride, padding, extra, dilation))
    if groups != 1 or strides[0] != strides[1] or dilations != (1, 1):
        return None
    s = strides[0]
    kernel = [int(k) for k in weight.meta["val"].shape[2:]]
    taps = (-(-kernel[0] // s), -(-kernel[1] // s))
    end = tuple(taps[i] * s - kernel[i] + pads[i] - extras[i] for i in range(2))
    if min(end) < 0:
        return None
    return SubPixel(s, taps, pads, (end[0], end[1]))


def _both(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else [int(v) for v in value]
    return (values[0], values[-1])
