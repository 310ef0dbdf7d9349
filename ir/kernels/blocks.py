"""Weights rebuilt from packed codes: every code is read from its one or two bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

ROWS = 4
COLUMNS = 256


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
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[r, c] = (code - zero_point[r, c // block]) * scale[r, c // block]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    group = column // block
    bytes_of_group = codes + (row * blocks + group) * block_bytes
    value = _code(bytes_of_group, column % block, BITS, block_bytes - 1, inside).to(tl.float32)
    if HAS_ZERO:
        zero = _code(zero_point + row * zero_bytes, group, BITS, zero_bytes - 1, inside)
        value -= zero.to(tl.float32)
    else:
        value -= 1 << (BITS - 1)
    value *= tl.load(scale + row * blocks + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


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
    dequantize_blocks_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        codes, scale, zero, y, rows, columns, blocks, block, block_bytes,
        0 if zero_point is None else zero.shape[1],
        BITS=bits, HAS_ZERO=zero_point is not None, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


dequantize_blocks = Kernel(_fits, _launch)
