"""Attention with capped scores and sinks, keys by blocks, no matrix of scores in memory.

A program has a block of queries of one head, and walks over the keys once with a running maximum
and sum. Floor: q, k, v and y move once; k and v are read again by every block of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats
from graphwright.ir.kernels.gemm_tiles import compute_type

WIDEST_HEAD = 256
"""Head sizes that a program holds in registers."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    q, k, v, mask, sinks, y, heads, groups, length, keys, width, wide, scale, softcap,
    mask_batch, mask_head, mask_row, mask_key,
    HAS_MASK: tl.constexpr, IS_TRUTH: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """y of M queries of one head of one sample."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    group = (batch * groups + head // (heads // groups)).to(tl.int64)
    lane, out = tl.arange(0, D), tl.arange(0, W)
    here = (batch * heads + head).to(tl.int64) * length + row
    inside = row < length
    query = tl.load(
        q + here[:, None] * width + lane[None, :],
        mask=inside[:, None] & (lane < width)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, W), tl.float32)
    if HAS_SINKS:
        top = tl.zeros((M,), tl.float32) + tl.load(sinks + head).to(tl.float32)
        total += 1.0
    for first in range(0, keys, N):
        key = first + tl.arange(0, N)
        held = key < keys
        place = (group * keys + key)[:, None]
        block = tl.load(
            k + place * width + lane[None, :],
            mask=held[:, None] & (lane < width)[None, :], other=0.0,
        )  # fmt: skip
        turned = tl.trans(block.to(COMPUTE))
        scores = tl.dot(query.to(COMPUTE), turned, input_precision="ieee") * scale
        if HAS_CAP:
            # tanh z = 2 sigmoid(2 z) - 1: libdevice's tanh has no interpreter form
            scores = softcap * (2.0 * tl.sigmoid(2.0 * (scores / softcap)) - 1.0)
        if HAS_MASK:
            at = batch.to(tl.int64) * mask_batch + head * mask_head
            given = tl.load(
                mask + at + row[:, None] * mask_row + key[None, :] * mask_key,
                mask=inside[:, None] & held[None, :], other=0,
            )  # fmt: skip
            if IS_TRUTH:
                scores = tl.where(given != 0, scores, -1e38)
            else:
                scores += given.to(tl.float32)
        scores = tl.where(held[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen no key yet has no maximum: any finite number will do
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shares = tl.exp2((scores - base[:, None]) * LOG2E)
        decay = tl.exp2((top - base) * LOG2E)
        values = tl.load(
            v + place * wide + out[None, :],
            mask=held[:, None] & (out < wide)[None, :], other=0.0,
        )  # fmt: skip
        total = total * decay + tl.sum(shares, 1)
        added = tl.dot(shares, values.to(tl.float32), input_precision="ieee")
        sums = sums * decay[:, None] + added
        top = highest
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        y + here[:, None] * wide + out[None, :], result.to(y.dtype.element_ty),
        mask=inside[:, None] & (out < wide)[None, :],
    )  # fmt: skip


def tiles_for(width: int, length: int) -> tuple[int, int, int]:
    """Queries and keys of a program's tile, and its warps, for the wider of the two head sizes."""
    wide = max(16, triton.next_power_of_2(width))
    if length <= 16:
        return 16, 64 if wide <= 64 else 32, 4
    return (32, 32, 4) if wide <= 128 else (16, 32, 8)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    q, k, v = (t.contiguous() for t in (q, k, v))
    batch, heads, length, width = q.shape
    groups, keys, wide = k.shape[1], k.shape[2], v.shape[3]
    y = torch.empty((batch, heads, length, wide), dtype=q.dtype, device=q.device)
    is_truth = mask is not None and mask.dtype == torch.bool
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.view(torch.uint8) if is_truth else mask
        mask = mask.expand(batch, heads, length, keys)
        strides = tuple(mask.stride())
    rows, columns, warps = tiles_for(max(width, wide), length)
    grid = (triton.cdiv(length, rows), batch * heads)
    attention_kernel[grid](
        q, k, v, q if mask is None else mask, q if sinks is None else sinks, y,
        heads, groups, length, keys, width, wide, scale, softcap, *strides,
        HAS_MASK=mask is not None, IS_TRUTH=is_truth, HAS_CAP=softcap > 0,
        HAS_SINKS=sinks is not None, COMPUTE=compute_type(q), M=rows, N=columns,
        D=max(16, triton.next_power_of_2(width)), W=max(16, triton.next_power_of_2(wide)),
        num_warps=warps,
    )  # fmt: skip
    return y


def _fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> bool:
    floats = [t for t in (q, k, v, mask, sinks) if t is not None and t.dtype != torch.bool]
    return (
        max(q.shape[3], v.shape[3]) <= WIDEST_HEAD
        and q.dtype == k.dtype == v.dtype
        and (mask is None or mask.dim() <= 4)
        and all_floats(*floats)
    )


attention = Kernel(_fits, _launch)
