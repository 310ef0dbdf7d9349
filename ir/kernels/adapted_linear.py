"""A layer and its low-rank adapter in one product: y is written once, and never read back.

The adapter is one more matrix product of depth rank before a tile is stored. From `DENSE_FROM`
tokens on cuBLAS does the product and adds the low-rank one in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats, as_rows
from graphwright.ir.kernels.epilogue import Epilogue, finish_tile, fits_epilogue
from graphwright.ir.kernels.gemm_tiles import (
    compute_type,
    grid_of,
    precision,
    split_for,
    sums_for,
    tile_of_program,
)
from graphwright.ir.kernels.tuning import Tiles

DENSE_FROM = 512
"""Tokens from which cuBLAS is faster than tiles of ours by more than the pass over y that it needs
for the low-rank term. Estimated, not measured."""


@triton.jit
def gemm_kernel(
    x, weight, bias, low, b, added, y, partial, m, n, k, rank, x_stride, weight_stride,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T, or of a part of it over k, and then the epilogue."""
    row, channel = tile_of_program(m, n, BLOCK_M, BLOCK_N, GROUP)
    column = tl.arange(0, BLOCK_K)
    x_place = x + row.to(tl.int64)[:, None] * x_stride
    weight_place = weight + channel.to(tl.int64)[None, :] * weight_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = tl.program_id(1)
    for start in range(part * BLOCK_K, k, SPLIT * BLOCK_K):
        inside = start + column < k
        left = tl.load(
            x_place + (start + column)[None, :],
            mask=(row < m)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            weight_place + (start + column)[:, None],
            mask=inside[:, None] & (channel < n)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
    both = (row < m)[:, None] & (channel < n)[None, :]
    place = row.to(tl.int64)[:, None] * n + channel[None, :]
    if SPLIT > 1:
        tl.store(partial + part.to(tl.int64) * m * n + place, total, mask=both)
    else:
        value = finish_tile(
            total, row, channel, m, n, bias, low, b, added, rank,
            HAS_BIAS, RANKS, HAS_ADDED, ACTIVATION, COMPUTE, PRECISION,
        )  # fmt: skip
        tl.store(y + place, value.to(y.dtype.element_ty), mask=both)


def tiles_for(m: int) -> Tiles:
    """Few tokens: small tiles, many programs. More: tiles that keep the tensor cores fed."""
    if m <= 16:
        return Tiles(16, 64, 128, 4, 4)
    if m <= 128:
        return Tiles(64, 128, 64, 4, 3)
    return Tiles(128, 128, 64, 8, 3)


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, added: Tensor | None,
    activation: str,
) -> bool:  # fmt: skip
    whole = all_floats(x, weight) and weight.dim() == 2 and weight.dtype == x.dtype
    return whole and fits_epilogue(x, bias, low, b, added)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, added: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    epilogue = Epilogue.of(bias, low, b, added, activation)
    rows, matrix = as_rows(x), as_rows(weight)
    (m, k), n = rows.shape, len(matrix)
    # exact float32 has no tensor cores, and tiles of such products spill kilobytes of registers
    is_exact = x.is_cuda and x.dtype == torch.float32 and precision() == "ieee"
    if m >= DENSE_FROM or is_exact:
        return epilogue.after_dense(rows, matrix).view(*x.shape[:-1], n)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tiles = tiles_for(m)
    split = split_for(m, n, k, tiles)
    partial = sums_for(m, n, split, x.device)
    gemm_kernel[grid_of(m, n, tiles, split)](
        rows, matrix, *epilogue.tensors(partial), y, partial, m, n, k, epilogue.rank,
        rows.stride(0), matrix.stride(0), **epilogue.constants(), COMPUTE=compute_type(x),
        PRECISION=precision(), SPLIT=split, GROUP=8,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if split > 1:
        epilogue.sum_parts(partial, y)
    return y.view(*x.shape[:-1], n)


adapted_linear = Kernel(_fits, _launch)
