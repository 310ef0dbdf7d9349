"""Weights rebuilt from packed codes: every code is read from its one or two bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

ROWS = 4
WIDTH = 256
"""Bytes of codes (2, 4 and 8 bits), or columns (the other widths), that a program handles."""


@triton.jit
def _code(packed, index, bits: tl.constexpr, last, inside):
    """Code `index` of a string of packed codes that ends with byte `last`."""
    start = index * bits
    byte, shift = start // 8, start % 8
    low = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    value = low >> shift
    if 8 % bits != 0:
        high = tl.load(packed + tl.minimum(byte + 1, last), mask=inside, other=0).to(tl.int32)
        value = value | (high << (8 - shift))
    return value & ((1 << bits) - 1)


@triton.jit
def dequantize_blocks_kernel(
    codes, scale, zero_point, y, rows, columns, blocks, block, block_bytes, zero_bytes,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y[r, c] = (code - zero_point[r, c // block]) * scale[r, c // block]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    if 8 % BITS == 0:
        # Whole codes in every byte: bytes are read once, side by side.
        part = tl.arange(0, 8 // BITS)[None, None, :]
        group = place // block_bytes
        at = (place % block_bytes) * (8 // BITS) + part
        column = group * block + at
        inside = (row < rows) & (at < block) & (column < columns)
        stored = (row < rows) & (group < blocks)
        byte = tl.load(codes + row * blocks * block_bytes + place, mask=stored, other=0)
        value = (byte.to(tl.int32) >> (part * BITS)) & ((1 << BITS) - 1)
    else:
        column = place
        group = column // block
        inside = (row < rows) & (column < columns)
        stored = inside
        start = codes + (row * blocks + group) * block_bytes
        value = _code(start, column % block, BITS, block_bytes - 1, inside)
    if HAS_ZERO:
        value -= _code(zero_point + row * zero_bytes, group, BITS, zero_bytes - 1, stored)
    else:
        value -= 1 << (BITS - 1)
    factor = tl.load(scale + row * blocks + group, mask=stored, other=0.0).to(tl.float32)
    result = value.to(tl.float32) * factor
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)


def _fits(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, columns: int
) -> bool:
    return all_floats(scale) and codes.dtype == torch.uint8 and 2 <= bits <= 8 and columns > 0


def _launch(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, columns: int
) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    rows, blocks, block_bytes = codes.shape
    zero = codes if zero_point is None else zero_point.contiguous()
    y = torch.empty((rows, columns), dtype=scale.dtype, device=codes.device)
    width = blocks * block_bytes if 8 % bits == 0 else columns
    dequantize_blocks_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, WIDTH))](
        codes, scale, zero, y, rows, columns, blocks, block, block_bytes,
        0 if zero_point is None else zero.shape[1],
        BITS=bits, HAS_ZERO=zero_point is not None, ROWS=ROWS, WIDTH=WIDTH,
    )  # fmt: skip
    return y


dequantize_blocks = Kernel(_fits, _launch)
