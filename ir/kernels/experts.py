"""Products of a mixture of experts: tiles of rows that share an expert, one launch for all.

Rows stay where they are: a tile reads the rows of its expert through their places in x, and
writes its results there. Weights in low-bit codes take the low-bit kernels, one launch per expert
that has rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel, low_bit_linear
from graphwright.ir.kernels.common import all_floats, as_rows
from graphwright.ir.kernels.gemm_tiles import compute_type, precision
from graphwright.ir.kernels.tuning import Tiles
from graphwright.ir.ops.experts import by_expert, routed


@triton.jit
def expert_gemm_kernel(
    x, order, weight, bias, y, tile_expert, tile_start, tile_end, n, k,
    x_stride, expert_stride, out_stride, in_stride,
    HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one expert times BLOCK_N of its outputs."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    place = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
    valid = place < tl.load(tile_end + tile)
    row = tl.load(order + place, mask=valid, other=0)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    matrix = weight + expert * expert_stride + channel.to(tl.int64)[None, :] * out_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, k, BLOCK_K):
        inside = block + column < k
        left = tl.load(
            x + row[:, None] * x_stride + (block + column)[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            matrix + (block + column).to(tl.int64)[:, None] * in_stride,
            mask=inside[:, None] & (channel < n)[None, :],
            other=0.0,
        )
        total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
    if HAS_BIAS:
        shift = tl.load(bias + expert * n + channel, mask=channel < n, other=0.0)
        total += shift.to(tl.float32)[None, :]
    both = valid[:, None] & (channel < n)[None, :]
    tl.store(y + row[:, None] * n + channel[None, :], total.to(y.dtype.element_ty), mask=both)


def tiles_for(rows_per_expert: int) -> Tiles:
    """Few rows of an expert: small tiles."""
    if rows_per_expert <= 16:
        return Tiles(16, 64, 64, 4, 4)
    return Tiles(64, 64, 64, 4, 3)


def _fits(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> bool:
    return all_floats(x, weight, bias) and x.dtype == weight.dtype


def _launch(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    """weight: (count, out, in), of any strides."""
    rows, (count, n, k) = as_rows(x), weight.shape
    order, sizes = routed(experts, count)
    tiles = tiles_for(-(-len(rows) // count))
    starts, plan = 0, []
    for expert, size in enumerate(sizes):
        plan += [(expert, starts + at, starts + size) for at in range(0, size, tiles.block_m)]
        starts += size
    which, start, end = torch.tensor(plan, dtype=torch.int64, device=x.device).unbind(1)
    y = torch.empty((len(rows), n), dtype=x.dtype, device=x.device)
    expert_gemm_kernel[(len(plan), triton.cdiv(n, tiles.block_n))](
        rows, order, weight, weight if bias is None else bias.contiguous(), y,
        which.contiguous(), start.contiguous(), end.contiguous(), n, k,
        rows.stride(0), *weight.stride(),
        HAS_BIAS=bias is not None, COMPUTE=compute_type(x), PRECISION=precision(),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def _launch_turned(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    return _launch(x, weight.transpose(1, 2), experts, bias)


def _fits_blocks(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, experts: Tensor,
    bias: Tensor | None, count: int, bits: int, block: int,
) -> bool:  # fmt: skip
    rest = (None, None, None, None, bits, block)
    return all_floats(bias) and low_bit_linear.blocks_linear.fits(x, codes, scale, None, *rest)


def _launch_blocks(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, experts: Tensor,
    bias: Tensor | None, count: int, bits: int, block: int,
) -> Tensor:  # fmt: skip
    out = len(codes) // count

    def part(tensor: Tensor | None, e: int) -> Tensor | None:
        return None if tensor is None else tensor[e * out : (e + 1) * out]

    def product(e: int, rows: Tensor) -> Tensor:
        stored: Any = (part(t, e) for t in (codes, scale, zero_point))
        own = None if bias is None else bias[e]
        y: Tensor = low_bit_linear.blocks_linear.launch(
            rows, *stored, own, None, None, None, bits, block, "none"
        )
        return y

    return by_expert(x, experts, count, product)


expert_linear = Kernel(_fits, _launch)
expert_matmul = Kernel(_fits, _launch_turned)
expert_blocks_linear = Kernel(_fits_blocks, _launch_blocks)
