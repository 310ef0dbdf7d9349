"""Products of inputs and a weight of 2, 4 or 8 bit codes, decoded in registers.

Two kernels for both kinds of codes, numbers (`dequantize_blocks`) and places in a table
(`dequantize_table`): `gemv_kernel` for one token, `gemm_kernel` for more. A row of the weight is
seen as pieces: runs of a power of two of columns that share a scale.

A multiprocessor of an H100 receives about 33 codes of 4 bits in a clock and issues 128 lane
instructions, so that decoding may take no more than 3.9 instructions per weight. The dot product
therefore reads 32-bit words and spends two: a code is cut out of its word in place, and the word
that is left is taken for a float32. Up to bit 23 such a word q * 2^s is the number q * 2^(s - 149),
a subnormal one or just above, which multiply-add handles exactly and at full speed. The input is
scaled by 2^(64 - s) before, the sum by 2^85 after, and zero points are taken off the sum of a
word by the sum of its inputs. Inputs beyond 2^63 overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.ir.kernels.blocks import _code
from graphwright.ir.kernels.epilogue import finish, finish_tile
from graphwright.ir.kernels.gemm_tiles import tile_of_program


@triton.jit
def _level(code, LEVELS: tl.constexpr):
    """The level of a 4-bit code, by 15 selections: no table to be read."""
    one, two, four, eight = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    a = tl.where(one, LEVELS[1], LEVELS[0])
    b = tl.where(one, LEVELS[3], LEVELS[2])
    c = tl.where(one, LEVELS[5], LEVELS[4])
    d = tl.where(one, LEVELS[7], LEVELS[6])
    low = tl.where(four, tl.where(two, d, c), tl.where(two, b, a))
    a = tl.where(one, LEVELS[9], LEVELS[8])
    b = tl.where(one, LEVELS[11], LEVELS[10])
    c = tl.where(one, LEVELS[13], LEVELS[12])
    d = tl.where(one, LEVELS[15], LEVELS[14])
    high = tl.where(four, tl.where(two, d, c), tl.where(two, b, a))
    return tl.where(eight, high, low)


@triton.jit
def gemv_kernel(
    x, words, scale, zero_point, levels, bias, low, b, added, y, partial,
    m, n, k, pieces, repeat, zero_bytes, rank, x_stride,
    TABLE: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """At most TOKENS tokens; `words` (n, pieces, WORDS) int32, a scale for `repeat` pieces."""
    PER: tl.constexpr = 32 // BITS
    DIRECT: tl.constexpr = 24 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    piece, word = tl.arange(0, PIECES), tl.arange(0, WORDS)
    token = tl.arange(0, TOKENS)
    wide_row = row.to(tl.int64)
    x_place = x + token[:, None, None].to(tl.int64) * x_stride
    total = tl.zeros((TOKENS, ROWS, PIECES, WORDS), tl.float32)
    for first in range(part * PIECES, pieces, SPLIT * PIECES):
        at = first + piece
        stored = (row < n)[:, None] & (at < pieces)[None, :]
        place = at[:, None] * WORDS + word[None, :]
        start = words + wide_row[:, None, None] * (pieces * WORDS)
        q = tl.load(start + place[None, :, :], mask=stored[:, :, None], other=0)[None, :, :, :]
        scales = pieces // repeat
        factor_place = wide_row[:, None] * scales + (at // repeat)[None, :]
        factor = tl.load(scale + factor_place, mask=stored, other=0.0).to(tl.float32)
        sum_word = tl.zeros((TOKENS, ROWS, PIECES, WORDS), tl.float32)
        sum_x = tl.zeros((TOKENS, PIECES, WORDS), tl.float32)
        for j in tl.static_range(PER):
            column = (place * PER + j)[None, :, :]
            inside = (token < m)[:, None, None] & (column < k)
            value = tl.load(x_place + column, mask=inside, other=0.0).to(tl.float32)
            if TABLE:
                # of two codes in a byte the first is the high half
                code = (q >> (j // 2 * 8 + 4 - j % 2 * 4)) & 15
                sum_word += tl.load(levels + code) * value[:, None, :, :]
            else:
                source = q if j < DIRECT else q >> 24
                code = source & (((1 << BITS) - 1) << (j % DIRECT * BITS))
                number = code.to(tl.float32, bitcast=True)
                sum_word += number * (value * 2.0 ** (64 - j % DIRECT * BITS))[:, None, :, :]
                sum_x += value
        if not TABLE:
            sum_word *= 2.0**85
            if HAS_ZERO:
                zero = _code(
                    zero_point + wide_row[:, None] * zero_bytes, (at // repeat)[None, :], BITS,
                    zero_bytes - 1, stored,
                )  # fmt: skip
                sum_word -= zero.to(tl.float32)[None, :, :, None] * sum_x[:, None, :, :]
            else:
                sum_word -= (sum_x * (1 << (BITS - 1)))[:, None, :, :]
        total += sum_word * factor[None, :, :, None]
    value = tl.sum(tl.sum(total, 3), 2)
    both = (token < m)[:, None] & (row < n)[None, :]
    at_y = token.to(tl.int64)[:, None] * n + row[None, :]
    if SPLIT > 1:
        tl.store(partial + part.to(tl.int64) * m * n + at_y, value, mask=both)
    else:
        value = finish(
            value, token, row, m, n, bias, low, b, added, rank,
            HAS_BIAS, RANKS, HAS_ADDED, ACTIVATION,
        )  # fmt: skip
        tl.store(y + at_y, value.to(y.dtype.element_ty), mask=both)


@triton.jit
def _bytes_to_codes(packed, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr):
    """(rows, bytes) to (rows, codes): the codes of a byte come side by side."""
    rows: tl.constexpr = packed.shape[0]
    count: tl.constexpr = packed.shape[1] * (8 // BITS)
    if BITS == 8:
        codes = packed
    elif BITS == 4:
        if HIGH_FIRST:
            codes = tl.reshape(tl.join(packed >> 4, packed & 15), (rows, count))
        else:
            codes = tl.reshape(tl.join(packed & 15, packed >> 4), (rows, count))
    else:
        even = tl.join(packed & 3, (packed >> 4) & 3)
        odd = tl.join((packed >> 2) & 3, packed >> 6)
        # the last axis added is the fastest: (.., byte half, parity)
        codes = tl.reshape(tl.join(even, odd), (rows, count))
    return codes


@triton.jit
def gemm_kernel(
    x, codes, scale, zero_point, bias, low, b, added, y, partial,
    m, n, k, pieces, repeat, row_bytes, zero_bytes, rank, x_stride,
    LEVELS: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, PIECE: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Several tokens; BLOCK_K divides PIECE, so that a row has one scale in a step of the loop."""
    row, channel = tile_of_program(m, n, BLOCK_M, BLOCK_N, GROUP)
    wide_channel = channel.to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    PER: tl.constexpr = 8 // BITS
    # Numbers are exact in every type; few sums are scaled in fewer instructions than weights are.
    SCALE_SUMS: tl.constexpr = BLOCK_M <= 16 and len(LEVELS) == 0
    # In a half type the codes and their product with a scale of that type are as exact as beyond.
    HALF: tl.constexpr = (
        len(LEVELS) == 0
        and scale.dtype.element_ty == COMPUTE
        and (tl.float16 == COMPUTE or (tl.bfloat16 == COMPUTE and BITS <= 4))
    )
    BASE: tl.constexpr = (1024.0 if tl.float16 == COMPUTE else 128.0) if HALF else 8388608.0
    byte = tl.arange(0, BLOCK_K // PER)
    x_place = x + row.to(tl.int64)[:, None] * x_stride
    code_place = codes + wide_channel[:, None] * row_bytes
    scales = pieces // repeat
    part = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * BLOCK_K, k, SPLIT * BLOCK_K):
        inside = start + column < k
        left = tl.load(
            x_place + (start + column)[None, :],
            mask=(row < m)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        packed = tl.load(
            code_place + (start // PER + byte)[None, :], mask=(channel < n)[:, None], other=0
        )
        at = start // PIECE // repeat
        factor = tl.load(scale + wide_channel * scales + at, mask=channel < n, other=0.0)
        factor = factor.to(tl.float32)
        if len(LEVELS) > 0:
            code = _bytes_to_codes(packed, BITS, True)
            number = _level(code, LEVELS)
        else:
            # A code becomes a float by its bits, a conversion of integers is slow: these are the
            # numbers BASE + code, whose last place is 1.
            if HALF:
                code = _bytes_to_codes(packed.to(tl.int16), BITS, False)
                code |= 0x6400 if tl.float16 == COMPUTE else 0x4300
                number = code.to(COMPUTE, bitcast=True)
            else:
                code = _bytes_to_codes(packed.to(tl.int32), BITS, False) | 0x4B000000
                number = code.to(tl.float32, bitcast=True)
            if HAS_ZERO:
                zero = _code(
                    zero_point + wide_channel * zero_bytes, at, BITS, zero_bytes - 1, channel < n
                )
                offset = BASE + zero.to(tl.float32)
                number -= offset[:, None].to(number.dtype)
            else:
                number -= BASE + (1 << (BITS - 1))
        if SCALE_SUMS:
            right = tl.trans(number.to(COMPUTE))
            step = tl.dot(left.to(COMPUTE), right, input_precision=PRECISION)
            total += step * factor[None, :]
        else:
            right = tl.trans((number * factor[:, None].to(number.dtype)).to(COMPUTE))
            total = tl.dot(left.to(COMPUTE), right, total, input_precision=PRECISION)
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
