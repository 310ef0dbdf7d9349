"""Products of few tokens and a weight in codebooks: every index is one wide load.

What limits the speed is the gather, 32 bytes from the second-level cache for every index of a
codebook that is too large for the first: such a weight saves memory, not time. From `DENSE_FROM`
tokens on the weight is rebuilt once, so that it is gathered once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel, codebook, tuning
from graphwright.ir.kernels.codebook import _index
from graphwright.ir.kernels.common import all_floats, as_rows
from graphwright.ir.kernels.epilogue import Epilogue, finish, fits_epilogue
from graphwright.ir.kernels.gemm_tiles import sums_for
from graphwright.ir.kernels.tuning import Tiles

DENSE_FROM = 4
"""Tokens from which the weight is rebuilt. Estimated, not measured."""


@triton.jit
def codebook_gemv_kernel(
    x, indices, codebooks, bias, low, b, added, y, partial,
    m, n, k, vectors, stride, groups, size, rank, x_stride,
    BITS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token: ROWS vectors of outputs, COLUMNS columns in a step of the loop."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide_row = row.to(tl.int64)[:, None]
    part = tl.program_id(1)
    token = tl.program_id(2) + tl.arange(0, 1)
    x_place = x + tl.program_id(2).to(tl.int64) * x_stride
    element = tl.arange(0, PADDED)
    total = tl.zeros((ROWS, COLUMNS, PADDED), tl.float32)
    for start in range(part * COLUMNS, k, SPLIT * COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < vectors)[:, None] & (column < k)[None, :]
        index = _index(indices, wide_row, column[None, :], stride, inside, BITS)
        index += (column.to(tl.int64) * groups // k * size)[None, :]
        place = codebooks + index[:, :, None] * WIDTH + element[None, None, :]
        mask = inside[:, :, None] & (element < WIDTH)[None, None, :]
        value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        left = tl.load(x_place + column, mask=column < k, other=0.0).to(tl.float32)
        total += value * left[None, :, None]
    channel = wide_row * WIDTH + element[None, :]
    # a place beyond the vector is one beyond the last channel
    channel = tl.where((element < WIDTH)[None, :], channel, n)
    channel = tl.reshape(channel, (ROWS * PADDED,))
    value = tl.reshape(tl.sum(total, 1), (1, ROWS * PADDED))
    both = (token < m)[:, None] & (channel < n)[None, :]
    at_y = token.to(tl.int64)[:, None] * n + channel[None, :]
    if SPLIT > 1:
        tl.store(partial + part.to(tl.int64) * m * n + at_y, value, mask=both)
    else:
        value = finish(
            value, token, channel, m, n, bias, low, b, added, rank,
            HAS_BIAS, RANKS, HAS_ADDED, ACTIVATION,
        )  # fmt: skip
        tl.store(y + at_y, value.to(y.dtype.element_ty), mask=both)


def tiles_for(vectors: int) -> list[Tiles]:
    """`block_n` vectors of outputs, `block_k` columns."""
    few = [Tiles(1, 4, 128, 4, 1, 4), Tiles(1, 4, 128, 4, 1, 1), Tiles(1, 2, 128, 4, 1, 4)]
    return few if vectors < 4 * 264 else [few[1], few[0], Tiles(1, 8, 64, 4, 1, 1)]


def _fits(
    x: Tensor, indices: Tensor, codebooks: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None, bits: int, *_: Any,
) -> bool:  # fmt: skip
    weight = indices.dtype == torch.uint8 and 1 <= bits <= 16 and all_floats(codebooks)
    small = x.dim() > 0 and x.shape[-1] * codebooks.shape[0] < 2**31
    return weight and small and x.numel() > 0 and fits_epilogue(x, bias, low, b, added)


def _launch(
    x: Tensor, indices: Tensor, codebooks: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    bits: int, rows: int, activation: str,
) -> Tensor:  # fmt: skip
    epilogue = Epilogue.of(bias, low, b, added, activation)
    inputs = as_rows(x)
    m, k = inputs.shape
    groups, size, width = codebooks.shape
    if m >= DENSE_FROM:
        weight = codebook.dequantize_codebook.launch(indices, codebooks, bits, rows, k)
        return epilogue.after_dense(inputs, weight.to(x.dtype)).view(*x.shape[:-1], rows)
    indices, codebooks = indices.contiguous(), codebooks.contiguous()
    words = indices.view(torch.int16) if bits == 16 else indices
    y = torch.empty((m, rows), dtype=x.dtype, device=x.device)

    def run(tiles: Tiles) -> None:
        split = min(tiles.split, triton.cdiv(k, tiles.block_k))
        partial = sums_for(m, rows, split, x.device)
        grid = (triton.cdiv(words.shape[0], tiles.block_n), split, m)
        codebook_gemv_kernel[grid](
            inputs, words, codebooks, *epilogue.tensors(partial), y, partial,
            m, rows, k, words.shape[0], words.stride(0), groups, size, epilogue.rank,
            inputs.stride(0),
            BITS=bits, WIDTH=width, PADDED=triton.next_power_of_2(width), **epilogue.constants(),
            SPLIT=split, ROWS=tiles.block_n, COLUMNS=tiles.block_k, num_warps=tiles.warps,
        )  # fmt: skip
        if split > 1:
            epilogue.sum_parts(partial, y)

    kind = (m, rows, k, bits, width, groups * size, codebooks.dtype, x.dtype)
    run(tuning.choose("codebook", kind, tiles_for(words.shape[0]), run, x.device))
    return y.view(*x.shape[:-1], rows)


codebook_linear = Kernel(_fits, _launch)
