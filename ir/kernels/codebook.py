"""Weights rebuilt from indices into codebooks: one wide load of a codebook for every index."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

ROWS, COLUMNS = 2, 64
"""Vectors that a program rebuilds, and in how many columns."""


@triton.jit
def _index(indices, row, column, stride, inside, BITS: tl.constexpr):
    """Index of a vector: a byte, a 16-bit word, or bits out of up to three bytes."""
    if BITS == 8 or BITS == 16:
        found = tl.load(indices + row * stride + column, mask=inside, other=0).to(tl.int32)
        return found & 0xFFFF
    start = column * BITS
    place = indices + row * stride + start // 8
    end = stride - 1 - start // 8
    found = tl.load(place, mask=inside, other=0).to(tl.int32)
    found |= tl.load(place + tl.minimum(1, end), mask=inside, other=0).to(tl.int32) << 8
    if BITS > 9:
        found |= tl.load(place + tl.minimum(2, end), mask=inside, other=0).to(tl.int32) << 16
    return (found >> start % 8) & ((1 << BITS) - 1)


@triton.jit
def dequantize_codebook_kernel(
    indices, codebooks, y, vectors, rows, columns, stride, groups, size,
    BITS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[r * WIDTH + e, c] = codebooks[c * groups // columns, index[r, c], e]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < vectors) & (column < columns)
    index = _index(indices, row, column, stride, inside, BITS)
    index += column * groups // columns * size
    element = tl.arange(0, PADDED)[None, None, :]
    start = codebooks + index.to(tl.int64)[:, :, None] * WIDTH
    value = tl.load(start + element, mask=inside[:, :, None] & (element < WIDTH), other=0.0)
    target = row[:, :, None] * WIDTH + element
    kept = inside[:, :, None] & (element < WIDTH) & (target < rows)
    tl.store(y + target * columns + column[:, :, None], value, mask=kept)


def _fits(indices: Tensor, codebooks: Tensor, bits: int, rows: int, columns: int) -> bool:
    return (
        all_floats(codebooks)
        and indices.dtype == torch.uint8
        and 1 <= bits <= 16
        and rows > 0
        and columns * codebooks.shape[0] < 2**31
    )


def _launch(indices: Tensor, codebooks: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    indices = indices.contiguous()
    words = indices.view(torch.int16) if bits == 16 else indices
    groups, size, width = codebooks.shape
    y = torch.empty((rows, columns), dtype=codebooks.dtype, device=codebooks.device)
    grid = (triton.cdiv(words.shape[0], ROWS), triton.cdiv(columns, COLUMNS))
    dequantize_codebook_kernel[grid](
        words, codebooks.contiguous(), y, words.shape[0], rows, columns, words.stride(0),
        groups, size, BITS=bits, WIDTH=width, PADDED=triton.next_power_of_2(width),
        ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


dequantize_codebook = Kernel(_fits, _launch)
