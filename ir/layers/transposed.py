"""Transposed convolutions as plain ones: one convolution gives all places of a stride at once.

With stride s, the results at places of one remainder mod s (one phase) are a convolution of the
input by every s-th weight. Side by side as channels they are one convolution with s times the
channels for every axis; moved to where they belong (`pixel_shuffle`) and cut, they are the
transposed convolution's result. Along one axis, result o lies at s * r + phase = o + begin, and tap
k reads input place r + (phase - begin + padding - k * dilation) / s where that is a whole number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.graph.nodes import arguments
from graphwright.ir.layers.kinds import TRANSPOSED_CONVOLUTIONS, operators

OPERATOR = torch.ops.aten.conv_transpose2d.input
"""In two dimensions."""

OPERATORS = operators(TRANSPOSED_CONVOLUTIONS)


@dataclass(frozen=True)
class Axis:
    """One axis of a transposed convolution, and its results' places in the plain form.

    Attributes:
        kernel, stride, padding, output_padding, dilation: of the transposed convolution.
        begin: results to cut off in front.
        room: results of the plain convolution more than the phases need.
    """

    kernel: int
    stride: int
    padding: int
    output_padding: int
    dilation: int
    begin: int = 0
    room: int = 0

    def place(self, tap: int) -> tuple[int, int]:
        """(phase, input place relative to the result's) of a tap."""
        at = self.begin - self.padding + tap * self.dilation
        phase = at % self.stride
        return phase, (phase - at) // self.stride

    @property
    def reads(self) -> tuple[int, int]:
        """First and last input place that any tap reads, relative to the result's."""
        places = [self.place(tap)[1] for tap in range(self.kernel)]
        return min(places), max(places)

    @property
    def taps(self) -> int:
        """Places of the plain convolution's window."""
        first, last = self.reads
        return last - first + 1

    @property
    def more(self) -> int:
        """Places of the result beyond stride * length, those cut in front among them."""
        grown = self.dilation * (self.kernel - 1) + self.output_padding + 1
        return grown - self.stride - 2 * self.padding + self.begin

    @property
    def pad(self) -> tuple[int, int]:
        """Zeros in front of the input and behind it; a negative number cuts."""
        first, last = self.reads
        return -first, -(-self.more // self.stride) + last + self.room

    @property
    def end(self) -> int:
        """Results to cut off behind."""
        return self.stride * (-(-self.more // self.stride) + self.room) - self.more


@dataclass(frozen=True)
class SubPixel:
    """A transposed convolution as a plain one, with all phases as channels.

    Attributes:
        axes: its spatial axes.
        groups: of channels.
    """

    axes: tuple[Axis, ...]
    groups: int

    @property
    def stride(self) -> tuple[int, ...]:
        """Factor by which the shuffle enlarges each axis."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def taps(self) -> tuple[int, ...]:
        """Window of the plain convolution."""
        return tuple(axis.taps for axis in self.axes)

    @property
    def begin(self) -> tuple[int, ...]:
        """Results to cut off in front of each axis."""
        return tuple(axis.begin for axis in self.axes)

    @property
    def end(self) -> tuple[int, ...]:
        """Results to cut off behind each axis."""
        return tuple(axis.end for axis in self.axes)

    def weight(self, weight: Tensor) -> Tensor:
        """(in, out / groups, *kernel) as (out * phases, in / groups, *taps)."""
        rows, columns = weight.shape[0] // self.groups, weight.shape[1]
        given = weight.reshape(self.groups, rows, *weight.shape[1:]).transpose(1, 2)
        made = weight.new_zeros(self.groups, columns, *self.stride, rows, *self.taps)
        for phases, places, taps in self._places():
            every = slice(None)
            source: Any = (..., *taps)
            into: Any = (every, every, *phases, every, *places)
            made[into] = given[source]
        return made.reshape(-1, rows, *self.taps).contiguous()

    def _places(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """(phases, places of the window, taps) of every weight."""
        for taps in itertools.product(*(range(axis.kernel) for axis in self.axes)):
            found = [axis.place(tap) for axis, tap in zip(self.axes, taps, strict=True)]
            places = [at - axis.reads[0] for axis, (_, at) in zip(self.axes, found, strict=True)]
            yield tuple(phase for phase, _ in found), tuple(places), taps

    def channels(self, values: Tensor) -> Tensor:
        """(out,) as (out * phases,)."""
        return values.repeat_interleave(math.prod(self.stride))


def sub_pixel(node: fx.Node) -> SubPixel | None:
    """The plain form of a transposed convolution with the smallest window; None for other nodes.

    Of several with that window, the one that cuts off least in front.
    """
    if node.target not in OPERATORS:
        return None
    axes, groups = _axes(node)
    best = [
        min((_begun(axis, begin) for begin in range(axis.stride)), key=lambda a: (a.taps, a.begin))
        for axis in axes
    ]
    return SubPixel(tuple(best), groups)


def even_sub_pixel(node: fx.Node) -> SubPixel | None:
    """A plain form in two dimensions that pads both ends alike, by all but one of its taps.

    It has one with one group, one stride for both and no dilation; None otherwise.
    """
    if node.target is not OPERATOR:
        return None
    axes, groups = _axes(node)
    if groups != 1 or axes[0].stride != axes[1].stride or any(a.dilation != 1 for a in axes):
        return None
    moved = [_begun(axis, axis.padding) for axis in axes]
    # as many zeros behind as in front: what is then too many results is cut off again
    even = [_begun(a, a.begin, room=a.taps - 1 - a.pad[1]) for a in moved]
    form = SubPixel(tuple(even), 1)
    return form if min(form.end) >= 0 and all(a.room >= 0 for a in even) else None


def _begun(axis: Axis, begin: int, room: int = 0) -> Axis:
    return Axis(axis.kernel, axis.stride, axis.padding, axis.output_padding, axis.dilation,
                begin, room)  # fmt: skip


def _axes(node: fx.Node) -> tuple[list[Axis], int]:
    given = arguments(node)
    kernel = [int(size) for size in given["weight"].meta["val"].shape[2:]]
    columns = [_each(given[name], len(kernel))
               for name in ("stride", "padding", "output_padding", "dilation")]  # fmt: skip
    axes = [Axis(*sizes) for sizes in zip(kernel, *columns, strict=True)]
    return axes, int(given["groups"])


def _each(value: object, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return [int(v) for v in (values * axes if len(values) == 1 else values)]
