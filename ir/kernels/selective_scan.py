"""Selective scan in chunks: their end states, a scan over these, then all chunks side by side.

A program holds the state of one chunk and a block of channels in registers, and reads x and
delta once per walk. A short length is one chunk and one launch. Floor: x, delta and y move once
for the outputs and x and delta once more for the end states; between the walks stand B K D N
floats of states, K = L / chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels import Kernel
from graphwright.ir.kernels.common import all_floats, new_like

CHUNK = 64
"""Steps in a chunk."""

WIDEST_STATE = 256
"""States per channel that a program can hold."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _advance(state, x, delta, b, rate):
    """The next state (D, N) and the exponent of the decay, base 2."""
    power = delta[:, None] * rate
    return tl.exp2(power) * state + (delta * x)[:, None] * b[None, :]


@triton.jit
def chunk_state_kernel(
    x, delta, a, b, states, decays, length, width, size, chunks,
    CHUNK: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """End state of every chunk that starts from zero, and the product of its decays."""
    chunk = tl.program_id(0)
    batch = chunk // chunks
    first = (chunk % chunks) * CHUNK
    channel, place = tl.program_id(1) * D + tl.arange(0, D), tl.arange(0, N)
    inside, held = channel < width, place < size
    tile = inside[:, None] & held[None, :]
    at = channel[:, None] * size + place[None, :]
    rate = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2E
    state, total = tl.zeros((D, N), tl.float32), tl.zeros((D,), tl.float32)
    row = batch.to(tl.int64) * length + first
    for t in range(0, tl.minimum(CHUNK, length - first)):
        u = tl.load(x + (row + t) * width + channel, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(delta + (row + t) * width + channel, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(b + (row + t) * size + place, mask=held, other=0.0).to(tl.float32)
        state = _advance(state, u, d, r, rate)
        total += d
    out = chunk.to(tl.int64) * width * size + at
    tl.store(states + out, state, mask=tile)
    tl.store(decays + out, tl.exp2(total[:, None] * rate), mask=tile)


@triton.jit
def carry_state_kernel(
    states, decays, starts, first, last, count, chunks,
    HAS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """State in front of every chunk, from the end states of those before it.

    With HAS_FIRST the first chunk begins from a state, and the one behind the last is written.
    """
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    carried = tl.zeros((BLOCK,), tl.float32)
    own = tl.program_id(0).to(tl.int64) * count + at
    if HAS_FIRST:
        carried += tl.load(first + own, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * chunks
    for k in range(0, chunks):
        here = (row + k) * count + at
        tl.store(starts + here, carried, mask=inside)
        decay = tl.load(decays + here, mask=inside, other=0.0)
        carried = decay * carried + tl.load(states + here, mask=inside, other=0.0)
    if HAS_FIRST:
        tl.store(last + own, carried.to(last.dtype.element_ty), mask=inside)


@triton.jit
def chunk_output_kernel(
    x, delta, a, b, c, starts, y, length, width, size, chunks,
    HAS_START: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y of every chunk, from the state in front of it."""
    chunk = tl.program_id(0)
    batch = chunk // chunks
    first = (chunk % chunks) * CHUNK
    channel, place = tl.program_id(1) * D + tl.arange(0, D), tl.arange(0, N)
    inside, held = channel < width, place < size
    tile = inside[:, None] & held[None, :]
    at = channel[:, None] * size + place[None, :]
    rate = tl.load(a + at, mask=tile, other=0.0).to(tl.float32) * LOG2E
    state = tl.zeros((D, N), tl.float32)
    if HAS_START:
        state = tl.load(starts + chunk.to(tl.int64) * width * size + at, mask=tile, other=0.0)
    row = batch.to(tl.int64) * length + first
    for t in range(0, tl.minimum(CHUNK, length - first)):
        u = tl.load(x + (row + t) * width + channel, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(delta + (row + t) * width + channel, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(b + (row + t) * size + place, mask=held, other=0.0).to(tl.float32)
        w = tl.load(c + (row + t) * size + place, mask=held, other=0.0).to(tl.float32)
        state = _advance(state, u, d, r, rate)
        total = tl.sum(state * w[None, :], 1)
        tl.store(y + (row + t) * width + channel, total.to(y.dtype.element_ty), mask=inside)


def tiles_for(size: int) -> tuple[int, int, int]:
    """Channels and states of a program's tile, and its warps: 16 values a thread."""
    states = max(4, triton.next_power_of_2(size))
    channels = max(8, min(64, 2048 // states))
    return channels, states, max(1, min(8, channels * states // 512))


def _launch(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _scanned(x, delta, a, b, c, None)[0]


def _launch_state(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    y, last = _scanned(x, delta, a, b, c, start.contiguous())
    assert last is not None
    return y, last


def _scanned(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y, and the last state where there is a first one."""
    x, delta, a, b, c = (t.contiguous() for t in (x, delta, a, b, c))
    (batch, length, width), size, y = x.shape, a.shape[1], new_like(x)
    chunks = triton.cdiv(length, CHUNK)
    channels, states, warps = tiles_for(size)
    grid = (batch * chunks, triton.cdiv(width, channels))
    sizes = (length, width, size, chunks)
    starts, last = y, None if first is None else new_like(first)
    has_start = chunks > 1 or first is not None
    if has_start:
        shape = (batch * chunks, width, size)
        ends, decays, starts = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
        chunk_state_kernel[grid](
            x, delta, a, b, ends, decays, *sizes, CHUNK=CHUNK, D=channels, N=states,
            num_warps=warps,
        )  # fmt: skip
        count = width * size
        carry_state_kernel[(batch, triton.cdiv(count, 512))](
            ends, decays, starts, ends if first is None else first, ends if last is None else last,
            count, chunks, HAS_FIRST=first is not None, BLOCK=512,
        )  # fmt: skip
    chunk_output_kernel[grid](
        x, delta, a, b, c, starts, y, *sizes, HAS_START=has_start, CHUNK=CHUNK, D=channels,
        N=states, num_warps=warps,
    )  # fmt: skip
    return y, last


def _fits(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> bool:
    return a.shape[1] <= WIDEST_STATE and all_floats(x, delta, a, b, c)


selective_scan = Kernel(_fits, _launch)


def _fits_state(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> bool:
    return _fits(x, delta, a, b, c) and all_floats(start)


selective_scan_state = Kernel(_fits_state, _launch_state)
