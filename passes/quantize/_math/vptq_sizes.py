"""Sizes of codebooks for a number of bits per weight, by what theory says of their error.

At high resolution the best codebook for vectors of v normal numbers, at R bits for each, leaves the
share c(v) 2^(-2R) of their variance, with c(v) = 2 Gamma(v/2 + 1)^(2/v) ((v + 2)/v)^(v/2) / v: the
integral of Zador's formula for a normal density, with the ball's moment in the place of the best
cell's (which is not known; a lower bound). c(1) = 2.72, c(4) = 1.59, c(8) = 1.35: long vectors are
better, until their codebook takes the bits. A second codebook is charged the same share again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from graphwright.passes.quantize._math.vptq import Size

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
LARGEST = 16
"""Bits of an index, at most."""

ENTRY = 16
"""Bits of an element of a codebook, in float16."""


def share_left(width: int, bits: float) -> float:
    """Share of a normal weight's variance that a codebook leaves, at `bits` for every weight."""
    ball: float = math.gamma(width / 2 + 1) ** (2 / width)
    constant: float = 2 * ball * ((width + 2) / width) ** (width / 2) / width
    return min(1.0, constant * math.pow(2, -2 * bits))


def bits_of(size: Size, rows: int, columns: int, groups: int = 1) -> float:
    """Stored bits per weight of a matrix: indices, of padded rows too, and codebooks."""
    indices = -(-rows // size.width) * columns
    total = 0.0
    for count in (size.count, size.residual):
        if count > 1:
            total += indices * math.ceil(math.log2(count)) + groups * count * size.width * ENTRY
    return total / (rows * columns)


def sizes_for(bits: float, rows: int, columns: int, groups: int = 1) -> Size | None:
    """The sizes of least expected error that take no more than `bits`; None where none does."""
    fitting = [
        size for size in _candidates() if bits_of(size, rows, columns, groups) <= bits
    ]  # fmt: skip
    return min(fitting, key=_expected, default=None)


def _expected(size: Size) -> tuple[float, int, int]:
    """What is left of the variance; then the smaller codebooks, which are found sooner."""
    left = share_left(size.width, math.log2(size.count) / size.width)
    if size.residual:
        left *= share_left(size.width, math.log2(size.residual) / size.width)
    return left, size.count + size.residual, size.width


def _candidates() -> Iterator[Size]:
    for width in WIDTHS:
        for main in range(1, LARGEST + 1):
            yield Size(width, 2**main)
            for residual in range(1, main + 1):
                yield Size(width, 2**main, 2**residual)
