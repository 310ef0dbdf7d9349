"""Weights from codes of a table: one pass over memory.

The table is read through its pointer: 16 to 256 numbers that stay in the first-level cache.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats

BYTES = 2048
"""Bytes of codes that a program reads: 16 for every thread."""


@triton.jit
def dequantize_table_kernel(
    codes, scale, levels, y, count, stored, block, BITS: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """y[i] = levels[codes[i]] * scale[i // block]; of two codes in a byte the first is high."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(codes + byte, mask=byte < stored, other=0).to(tl.int32)
    if BITS == 4:
        code = tl.interleave(packed >> 4, packed & 15)
        index = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    else:
        code = packed
        index = byte
    inside = index < count
    value = tl.load(levels + code)
    value *= tl.load(scale + index // block, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


def _fits(codes: Tensor, scale: Tensor, table: str, block: int, shape: list[int]) -> bool:
    return all_floats(scale) and codes.dtype == torch.uint8 and math.prod(shape) > 0


@functools.cache
def levels_on(name: str, device: torch.device) -> Tensor:
    """The levels of a table on a device: copied once, which a captured graph could not repeat."""
    from graphwright.ir.ops.table import levels

    return levels(name).to(device)


def _launch(codes: Tensor, scale: Tensor, table: str, block: int, shape: list[int]) -> Tensor:
    from graphwright.ir.ops.table import BITS

    y = torch.empty(shape, dtype=scale.dtype, device=codes.device)
    dequantize_table_kernel[(triton.cdiv(codes.numel(), BYTES),)](
        codes.contiguous(), scale.contiguous(), levels_on(table, codes.device), y,
        y.numel(), codes.numel(), block, BITS=BITS[table], BYTES=BYTES,
    )  # fmt: skip
    return y


dequantize_table = Kernel(_fits, _launch)
