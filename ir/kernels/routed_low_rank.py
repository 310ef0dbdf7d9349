"""Low-rank changes of a batch in which every sample has its own adapter: to the rank, and back.

Two launches for all samples. A tile holds tokens of one sample, so that it reads the factors of
one adapter; a sample without one costs a copy. Punica's and S-LoRA's kernels do the same on tokens
that are sorted by adapter; here the samples are sorted already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats
from graphwright.ir.kernels.gemm_tiles import compute_type, precision

BLOCK_K, BLOCK_N = 128, 128
LARGEST_RANK = 128
"""Of one program of the first launch; a larger rank takes several."""


@triton.jit
def to_rank_kernel(
    x, a, which, low, tokens, rank, k, adapters,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """low (batch, tokens, rank) float32 = x (batch, tokens, k) @ a[which].T."""
    sample = tl.program_id(0).to(tl.int64)
    adapter = tl.load(which + sample).to(tl.int64)
    if (adapter >= 0) & (adapter < adapters):
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        index = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        column = tl.arange(0, BLOCK_K)
        x_place = x + (sample * tokens + token.to(tl.int64))[:, None] * k
        a_place = a + (adapter * rank + index.to(tl.int64))[None, :] * k
        total = tl.zeros((TOKENS, RANKS), tl.float32)
        for start in range(0, k, BLOCK_K):
            inside = start + column < k
            left = tl.load(
                x_place + (start + column)[None, :],
                mask=(token < tokens)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                a_place + (start + column)[:, None],
                mask=inside[:, None] & (index < rank)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
        place = low + (sample * tokens + token.to(tl.int64))[:, None] * rank + index[None, :]
        tl.store(place, total, mask=(token < tokens)[:, None] & (index < rank)[None, :])


@triton.jit
def from_rank_kernel(
    low, b, which, added, y, tokens, rank, n, adapters,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (batch, tokens, n) = added + low @ b[which].T."""
    sample = tl.program_id(0).to(tl.int64)
    adapter = tl.load(which + sample).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    both = (token < tokens)[:, None] & (channel < n)[None, :]
    row = sample * tokens + token.to(tl.int64)
    place = row[:, None] * n + channel[None, :]
    total = tl.load(added + place, mask=both, other=0.0).to(tl.float32)
    if (adapter >= 0) & (adapter < adapters):
        b_place = b + (adapter * n + channel.to(tl.int64))[None, :] * rank
        for start in range(0, rank, RANKS):
            index = start + tl.arange(0, RANKS)
            left = tl.load(
                low + row[:, None] * rank + index[None, :],
                mask=(token < tokens)[:, None] & (index < rank)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                b_place + index[:, None],
                mask=(index < rank)[:, None] & (channel < n)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
    elif adapter != -1:  # there is no such adapter, and a kernel cannot raise
        total += float("nan")
    tl.store(y + place, total.to(y.dtype.element_ty), mask=both)


def _fits(x: Tensor, a: Tensor, b: Tensor, which: Tensor, added: Tensor) -> bool:
    same = x.dtype == a.dtype == b.dtype == added.dtype
    return same and all_floats(x, a, b, added) and which.dtype == torch.int64


def tiles_for(tokens: int, rank: int) -> tuple[int, int]:
    """Tokens and ranks of a tile. A matrix product needs 16 of each."""
    ranks = min(LARGEST_RANK, max(16, triton.next_power_of_2(rank)))
    return min(64, max(16, triton.next_power_of_2(tokens))), ranks


def _launch(x: Tensor, a: Tensor, b: Tensor, which: Tensor, added: Tensor) -> Tensor:
    x, a, b, added, which = (t.contiguous() for t in (x, a, b, added, which))
    batch, k = x.shape[0], x.shape[-1]
    tokens = x.numel() // (batch * k)
    adapters, n, rank = b.shape
    y = torch.empty_like(added)
    low = torch.empty((batch, tokens, rank), device=x.device)
    count, ranks = tiles_for(tokens, rank)
    same = {"COMPUTE": compute_type(x), "PRECISION": precision(), "TOKENS": count, "RANKS": ranks}
    blocks = triton.cdiv(tokens, count)
    to_rank_kernel[(batch, blocks, triton.cdiv(rank, ranks))](
        x, a, which, low, tokens, rank, k, adapters, BLOCK_K=BLOCK_K, **same
    )
    from_rank_kernel[(batch, blocks, triton.cdiv(n, BLOCK_N))](
        low, b, which, added, y, tokens, rank, n, adapters, BLOCK_N=BLOCK_N, **same
    )
    return y


routed_low_rank = Kernel(_fits, _launch)
