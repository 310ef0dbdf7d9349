"""The forms of a weight in codes that a checkpoint may hold, as our own ops store them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from graphwright.ir.stored.table import Table


@dataclass(frozen=True)
class Blocks:
    """Codes of few bits, groups of inputs sharing a scale and a zero point.

    weight = (q - zero) * scale + rest.

    Attributes:
        q: (out, in) uint8.
        scale: (out, groups) float.
        zero: (out, groups) uint8; None for 2^(bits - 1) everywhere.
        order: (in,) int64 that brings inputs of one group side by side; None where they are.
            The columns of `q` are in that order.
        bits: 2 to 8.
        block: inputs of a group.
        rest: (out, groups) float32, what a block with a free minimum has beside the whole steps of
            its scale; None for nothing.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bits: int
    block: int
    rest: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.q.shape)


@dataclass(frozen=True)
class Integers:
    """8-bit codes with a scale per output channel or one for all.

    Attributes:
        codes: (out, in) int8.
        scale: (out,) or () float.
        zero: like `scale`, int8; None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.codes.shape)


@dataclass(frozen=True)
class Floats8:
    """Float8 e4m3 values, runs of inputs of one row sharing a scale.

    Attributes:
        codes: (out, in) uint8, the bytes of the values.
        scale: () for all, or (out, runs) float: every run has in / runs inputs.
    """

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.codes.shape)


@dataclass(frozen=True)
class Expanded:
    """A weight (out, in) whose codes no op of ours rebuilds: its float values.

    Attributes:
        weight: float.
        why: what the codes were, for the summary.
    """

    weight: Tensor
    why: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.weight.shape)


Form = Blocks | Integers | Floats8 | Expanded | Table


def tiled(scale: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """(out, runs): the scales of tiles of a weight, for `Floats8`.

    Args:
        scale: (rows of tiles, columns of tiles).
        shape: (out, in) of the weight.
        tile: (outputs, inputs) of a tile; the last ones may be cut off.
    """
    out, inputs = shape
    run = inputs if tile[1] >= inputs else math.gcd(inputs, tile[1])
    rows = scale.repeat_interleave(tile[0], 0)[:out]
    return rows.repeat_interleave(tile[1] // run, 1)[:, : inputs // run].contiguous()
