"""Linear layer on an int8 weight: a dot product per row for one token, tiles for more.

The weight is decoded in registers and its per-channel scale is applied to the finished sum, so
memory traffic is one byte per weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel, quantize
from graphwright.ir.kernels.activation import bias_act
from graphwright.ir.kernels.common import activate, all_floats, as_rows
from graphwright.ir.kernels.gemm_tiles import (
    compute_type,
    grid_of,
    precision,
    split_for,
    sums_for,
    tile_of_program,
)
from graphwright.ir.kernels.tuning import Tiles


@triton.jit
def gemv_kernel(
    x, weight, scale, bias, y, n, k, weight_stride,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act(scale * (weight @ x) + bias) for one token; BLOCK_N channels per program."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    start = weight + row.to(tl.int64)[:, None] * weight_stride
    # summed across threads once, after the loop
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for block in range(0, k, BLOCK_K):
        inside = block + column < k
        part = tl.load(x + block + column, mask=inside, other=0.0).to(tl.float32)
        both = (row < n)[:, None] & inside[None, :]
        codes = tl.load(start + (block + column)[None, :], mask=both, other=0)
        total += codes.to(tl.float32) * part[None, :]
    value = tl.sum(total, 1) * tl.load(scale + row, mask=row < n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(y + row, activate(value, ACTIVATION).to(y.dtype.element_ty), mask=row < n)


@triton.jit
def gemm_kernel(
    x, weight, scale, bias, y, partial, m, n, k, x_stride, weight_stride,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act((x @ weight.T) * scale + bias); with SPLIT > 1 the float32 sums go to `partial`."""
    row, channel = tile_of_program(m, n, BLOCK_M, BLOCK_N, GROUP)
    column = tl.arange(0, BLOCK_K)
    x_place = x + row.to(tl.int64)[:, None] * x_stride
    weight_place = weight + channel.to(tl.int64)[None, :] * weight_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = tl.program_id(1)
    for block in range(part * BLOCK_K, k, SPLIT * BLOCK_K):
        inside = block + column < k
        left = tl.load(
            x_place + (block + column)[None, :],
            mask=(row < m)[:, None] & inside[None, :],
            other=0.0,
        )
        codes = tl.load(
            weight_place + (block + column)[:, None],
            mask=inside[:, None] & (channel < n)[None, :],
            other=0,
        )
        total = tl.dot(left.to(COMPUTE), codes.to(COMPUTE), total, input_precision=PRECISION)
    both = (row < m)[:, None] & (channel < n)[None, :]
    place = row.to(tl.int64)[:, None] * n + channel[None, :]
    if SPLIT > 1:
        tl.store(partial + part.to(tl.int64) * m * n + place, total, mask=both)
    else:
        total *= tl.load(scale + channel, mask=channel < n, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + channel, mask=channel < n, other=0.0).to(tl.float32)[None, :]
        tl.store(y + place, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=both)


@triton.jit
def reduce_kernel(
    partial, scale, bias, y, m, n,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the partial sums in a fixed order, so that reruns agree bit for bit, then finish."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < n
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial + (part * m + row) * n + channel, mask=inside, other=0.0)
    total *= tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + channel, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=inside)


DENSE_FROM = 1024
"""Tokens from which decoding the weight once costs less than decoding it in every tile (measured
on an H100: docs/benchmarks-gpu.md)."""


def tiles_for(m: int) -> Tiles:
    """Few tokens: small tiles, many programs. More: tiles that keep the tensor cores fed."""
    if m <= 16:
        return Tiles(16, 64, 128, 4, 4)
    if m <= 128:
        return Tiles(64, 64, 64, 4, 4)
    return Tiles(128, 128, 64, 8, 3)


def _fits(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> bool:
    return (
        x.dim() > 0
        and weight.dtype == torch.int8
        and weight.dim() == 2
        and weight.numel() > 0
        and all_floats(x, scale, bias)
    )


def _launch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    rows, codes = as_rows(x), as_rows(weight)
    (m, k), n = rows.shape, codes.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    scale = scale.contiguous()
    if m >= DENSE_FROM and scale.dtype == x.dtype:
        return _launch_dense(rows, codes, scale, bias, activation).view(y.shape)
    has_bias = bias is not None
    added = scale if bias is None else bias.contiguous()
    if m == 1:
        block_n, block_k = 4, min(1024, triton.next_power_of_2(k))
        gemv_kernel[(triton.cdiv(n, block_n),)](
            rows, codes, scale, added, y, n, k, codes.stride(0),
            HAS_BIAS=has_bias, ACTIVATION=activation, BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
        return y
    tiles = tiles_for(m)
    split = split_for(m, n, k, tiles)
    partial = sums_for(m, n, split, x.device)
    gemm_kernel[grid_of(m, n, tiles, split)](
        rows, codes, scale, added, y, partial, m, n, k, rows.stride(0), codes.stride(0),
        HAS_BIAS=has_bias, ACTIVATION=activation, COMPUTE=compute_type(x),
        PRECISION=precision(), SPLIT=split, GROUP=8,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if split > 1:
        reduce_kernel[(m, triton.cdiv(n, 512))](
            partial, scale, added, y, m, n,
            HAS_BIAS=has_bias, ACTIVATION=activation, SPLIT=split, BLOCK=512,
        )  # fmt: skip
    return y


def _launch_dense(
    rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Rebuild the weight once and leave the product to cuBLAS; the activation is our kernel."""
    weight = quantize.dequantize.launch(codes, scale, None, 0)
    if activation == "none":
        return torch.nn.functional.linear(rows, weight, bias)
    y: Tensor = bias_act.launch(torch.nn.functional.linear(rows, weight), bias, activation)
    return y


int8_linear = Kernel(_fits, _launch)
