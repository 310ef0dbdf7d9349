"""Attention over a cache in three kernels: write the new tokens, attend, put the parts together.

A program of `attend` holds the queries of all heads that share a key head, for a few tokens, and
walks through its part of the slots with a running softmax: every key is read once for all of
them. A step has few queries, so the slots are divided among programs until the device is full,
and a last kernel weighs the parts. Lengths are read on the device and sizes of grids follow from
the capacity alone: a captured graph serves steps of any length. Codes are multiplied as they
are; scales per channel go onto queries and results, scales per token onto scores and shares.

Floor of a step: keys and values of the filled slots, read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats
from graphwright.ir.kernels.gemm_tiles import PROGRAMS, compute_type, precision

WIDEST = 256
"""Values of a head that a program can hold."""

MOST_PARTS = 64
"""Parts of the slots at most."""

EXACT = 1.5 * 2.0**23
"""Adding and taking away this number rounds a float32 below 2**22 half to even, on any device."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def slot_place(table, row, slot, head, shared, block, columns, inside, PAGED: tl.constexpr):
    """Index of a row's slots among all (block, head, slot) of a buffer."""
    if PAGED:
        held = tl.load(table + row * columns + slot // block, mask=inside, other=0)
        slot = slot % block
    else:
        held = row
    return (held.to(tl.int64) * shared + head) * block + slot


@triton.jit
def append_kernel(
    new, buffer, scale, lengths, table, tokens, shared, width, block, columns,
    row_stride, head_stride, token_stride,
    PAGED: tl.constexpr, BITS: tl.constexpr, BY_TOKEN: tl.constexpr, EXACT: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """One head of one new token, as floats or codes, into its slot."""
    row, token, head = tl.program_id(0) // tokens, tl.program_id(0) % tokens, tl.program_id(1)
    channel = tl.arange(0, DIM)
    inside = channel < width
    start = row.to(tl.int64) * row_stride + head * head_stride + token.to(tl.int64) * token_stride
    x = tl.load(new + start + channel, mask=inside, other=0.0)
    slot = tl.load(lengths + row) + token
    place = slot_place(table, row, slot, head, shared, block, columns, True, PAGED)
    if BITS == 0:
        tl.store(buffer + place * width + channel, x.to(buffer.dtype.element_ty), mask=inside)
    else:
        most = 2.0 ** (BITS - 1) - 1.0
        x = x.to(tl.float32)
        if BY_TOKEN:
            step = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), most), 1e-8)
            tl.store(scale + place, step.to(scale.dtype.element_ty))
            ratio = tl.div_rn(x, tl.zeros((DIM,), tl.float32) + step)
        else:
            step = tl.load(scale + head * width + channel, mask=inside, other=1.0)
            ratio = tl.div_rn(x, step.to(tl.float32))
        code = (tl.minimum(tl.maximum(ratio, -most), most) + EXACT) - EXACT
        code = code.to(tl.int32)
        if BITS == 8:
            tl.store(buffer + place * width + channel, code.to(tl.int8), mask=inside)
        else:
            low, high = tl.split(tl.reshape(code & 15, (DIM // 2, 2)))
            pair = tl.arange(0, DIM // 2)
            packed = (low | (high << 4)).to(tl.uint8)
            tl.store(buffer + place * (width // 2) + pair, packed, mask=pair < width // 2)


@triton.jit
def cache_tile(buffer, place, inside, width, BITS: tl.constexpr, DIM: tl.constexpr):
    """Floats or codes of some slots: (slots, DIM)."""
    if BITS == 4:
        pair = tl.arange(0, DIM // 2)
        bytes_at = buffer + place[:, None] * (width // 2) + pair[None, :]
        held = inside[:, None] & (pair < width // 2)[None, :]
        packed = tl.load(bytes_at, mask=held, other=0).to(tl.int32)
        low, high = packed & 15, packed >> 4
        return tl.interleave(low - ((low & 8) << 1), high - ((high & 8) << 1))
    else:
        channel = tl.arange(0, DIM)
        held = inside[:, None] & (channel < width)[None, :]
        return tl.load(buffer + place[:, None] * width + channel[None, :], mask=held, other=0)


@triton.jit
def attend_kernel(
    q, keys, values, key_scale, value_scale, lengths, table, sinks, y, partial, tops, sums,
    tokens, groups, shared, width, block, columns, window, scale, softcap,
    row_stride, head_stride, token_stride,
    BITS: tl.constexpr, KEY_TOKEN: tl.constexpr, VALUE_TOKEN: tl.constexpr, PAGED: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, HAS_SINK: tl.constexpr, SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Rows (a token of a head of the group) over one part of the slots."""
    row, head = tl.program_id(0) // shared, tl.program_id(0) % shared
    item = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, member = item // groups, item % groups
    real = token < tokens
    channel = tl.arange(0, DIM)
    whole = channel < width
    start = row.to(tl.int64) * row_stride + (head * groups + member) * head_stride
    start += token.to(tl.int64) * token_stride
    tile = real[:, None] & whole[None, :]
    query = tl.load(q + start[:, None] + channel[None, :], mask=tile, other=0.0)
    if BITS > 0 and not KEY_TOKEN:
        step = tl.load(key_scale + head * width + channel, mask=whole, other=0.0).to(tl.float32)
        query = query.to(tl.float32) * step[None, :]
    query = query.to(COMPUTE)

    length = tl.load(lengths + row)
    at = length + token
    last = tl.minimum(tokens - 1, (tl.program_id(1) * ROWS + ROWS - 1) // groups)
    low, high = 0, length + last + 1
    if WINDOW:
        low = tl.maximum(0, length + tl.program_id(1) * ROWS // groups + 1 - window)
    part = tl.cdiv(tl.cdiv(high - low, SPLIT), SLOTS) * SLOTS
    low += tl.program_id(2) * part
    high = tl.minimum(high, low + part)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, DIM), tl.float32)
    for begin in range(low, high, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        inside = slot < high
        place = slot_place(table, row, slot, head, shared, block, columns, inside, PAGED)
        key = cache_tile(keys, place, inside, width, BITS, DIM).to(COMPUTE)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if KEY_TOKEN:
            score *= tl.load(key_scale + place, mask=inside, other=0.0).to(tl.float32)[None, :]
        if CAPPED:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        seen = inside[None, :] & (slot[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (slot[None, :] > at[:, None] - window)
        score = tl.where(seen, score * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(share, 1)
        if VALUE_TOKEN:
            share *= tl.load(value_scale + place, mask=inside, other=0.0).to(tl.float32)[None, :]
        value = cache_tile(values, place, inside, width, BITS, DIM).to(COMPUTE)
        found = found * kept[:, None]
        found += tl.dot(share.to(COMPUTE), value, input_precision=PRECISION)
        top = higher
    if BITS > 0 and not VALUE_TOKEN:
        step = tl.load(value_scale + head * width + channel, mask=whole, other=0.0).to(tl.float32)
        found *= step[None, :]

    if SPLIT == 1:
        if HAS_SINK:
            sink = tl.load(sinks + head * groups + member).to(tl.float32) * LOG2E
            base = tl.maximum(top, sink)
            kept = tl.exp2(top - base)
            total = total * kept + tl.exp2(sink - base)
            found *= kept[:, None]
        found /= tl.where(total > 0, total, 1.0)[:, None]
        out = ((row * shared + head) * groups + member).to(tl.int64) * tokens + token
        place = y + out[:, None] * width + channel[None, :]
        tl.store(place, found.to(y.dtype.element_ty), mask=tile)
    else:
        item = (tl.program_id(0).to(tl.int64) * SPLIT + tl.program_id(2)) * (tokens * groups) + item
        tl.store(tops + item, top, mask=real)
        tl.store(sums + item, total, mask=real)
        tl.store(partial + item[:, None] * DIM + channel[None, :], found, mask=real[:, None])


@triton.jit
def combine_kernel(
    partial, tops, sums, sinks, y, tokens, groups, shared, width,
    HAS_SINK: tl.constexpr, SPLIT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The parts of one row, weighed by the sums of their exponentials."""
    pair, item = tl.program_id(0), tl.program_id(1)
    token, member = item // groups, item % groups
    part, channel = tl.arange(0, SPLIT), tl.arange(0, DIM)
    at = (pair.to(tl.int64) * SPLIT + part) * (tokens * groups) + item
    top, total = tl.load(tops + at), tl.load(sums + at)
    base = tl.max(top, 0)
    if HAS_SINK:
        sink = tl.load(sinks + pair % shared * groups + member).to(tl.float32)
        base = tl.maximum(base, sink * LOG2E)
    kept = tl.exp2(top - base)
    found = tl.load(partial + at[:, None] * DIM + channel[None, :])
    found = tl.sum(found * kept[:, None], 0)
    whole = tl.sum(total * kept, 0)
    if HAS_SINK:
        whole += tl.exp2(sink * LOG2E - base)
    out = (pair * groups + member).to(tl.int64) * tokens + token
    place = y + out * width + channel
    tl.store(place, (found / whole).to(y.dtype.element_ty), mask=channel < width)


def tiles_for(rows: int, dim: int, compute: tl.dtype) -> tuple[int, int, int]:
    """Rows and slots of a program's tile, and its warps."""
    if compute == tl.float32:  # exact products have no tensor cores: larger tiles spill
        return 16, 16, 4
    slots = 64 if dim <= 128 else 32
    return (16, slots, 4) if rows <= 16 else (64, slots // 2, 4)


def parts_for(programs: int, slots: int, tile: int) -> int:
    """Parts of the slots, a power of two: as many as fill the device."""
    most = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(slots, tile)))
    return int(max(1, min(most, triton.next_power_of_2(triton.cdiv(PROGRAMS, programs)))))


def _bits(buffer: Tensor) -> int:
    return {torch.int8: 8, torch.uint8: 4}.get(buffer.dtype, 0)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _append(new: Tensor, buffer: Tensor, scale: Tensor | None, lengths: Tensor, table: Any) -> None:
    new = _dense_rows(new)
    batch, shared, tokens, width = new.shape
    append_kernel[(batch * tokens, shared)](
        new, buffer, buffer if scale is None else scale, lengths,
        lengths if table is None else table, tokens, shared, width, buffer.shape[2],
        1 if table is None else table.shape[1], *new.stride()[:3], PAGED=table is not None,
        BITS=_bits(buffer), BY_TOKEN=scale is not None and scale.dim() == 3, EXACT=EXACT,
        DIM=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor, v: Tensor, key_buffer: Tensor, value_buffer: Tensor, lengths: Tensor,
    table: Tensor | None, scale: float, window: int, softcap: float, sinks: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    _append(k, key_buffer, key_scale, lengths, table)
    _append(v, value_buffer, value_scale, lengths, table)
    q = _dense_rows(q)
    (batch, heads, tokens, width), shared = q.shape, k.shape[1]
    groups, block = heads // shared, key_buffer.shape[2]
    columns = 1 if table is None else table.shape[1]
    y, compute = torch.empty(q.shape, dtype=q.dtype, device=q.device), compute_type(q)
    dim = max(16, triton.next_power_of_2(width))
    rows, slots, warps = tiles_for(tokens * groups, dim, compute)
    tiles = triton.cdiv(tokens * groups, rows)
    split = parts_for(batch * shared * tiles, block * columns, slots)
    items = batch * shared * split * tokens * groups if split > 1 else 1
    partial, tops, sums = (
        torch.empty(items * size, dtype=torch.float32, device=q.device) for size in (dim, 1, 1)
    )
    column = lengths if sinks is None else sinks
    attend_kernel[(batch * shared, tiles, split)](
        q, key_buffer, value_buffer, q if key_scale is None else key_scale,
        q if value_scale is None else value_scale, lengths, lengths if table is None else table,
        column, y, partial, tops, sums, tokens, groups, shared, width, block, columns, window,
        scale, softcap, *q.stride()[:3], BITS=_bits(key_buffer),
        KEY_TOKEN=key_scale is not None and key_scale.dim() == 3,
        VALUE_TOKEN=value_scale is not None and value_scale.dim() == 3, PAGED=table is not None,
        WINDOW=window > 0, CAPPED=softcap > 0, HAS_SINK=sinks is not None, SPLIT=split,
        COMPUTE=compute, PRECISION=precision(), ROWS=rows, SLOTS=slots, DIM=dim, num_warps=warps,
        num_stages=2,
    )  # fmt: skip
    if split > 1:
        combine_kernel[(batch * shared, tokens * groups)](
            partial, tops, sums, column, y, tokens, groups, shared, width,
            HAS_SINK=sinks is not None, SPLIT=split, DIM=dim,
        )  # fmt: skip
    return y


def _fits(
    q: Tensor, k: Tensor, v: Tensor, key_buffer: Tensor, value_buffer: Tensor, lengths: Tensor,
    table: Tensor | None, scale: float, window: int, softcap: float, sinks: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None,
) -> bool:  # fmt: skip
    bits, width = _bits(key_buffer), q.shape[3]
    scales = (key_scale, value_scale)
    whole = all(s is None or s.is_contiguous() for s in (*scales, table, sinks))
    return (
        all_floats(q, k, v, sinks, *scales)
        and (bits > 0 or all_floats(key_buffer, value_buffer))
        and bits == _bits(value_buffer)
        and k.shape == v.shape
        and width <= WIDEST
        and (bits != 4 or width % 2 == 0)
        and all(t is None or t.dtype == torch.int32 for t in (lengths, table))
        and key_buffer.is_contiguous()
        and value_buffer.is_contiguous()
        and whole
    )


cached_attention = Kernel(_fits, _launch)
