"""Launches of the low-bit products: which kernel, which tiles, on which view of the codes.

One or two tokens take the dot product, up to `DENSE_FROM` the tiles; from there on the weight is
rebuilt once and cuBLAS does the product, which costs less than decoding it in every tile. Where
float32 may not be rounded for tensor cores it is rebuilt from five tokens on. Weights that the
kernels do not take (blocks that are no multiple of 16, codes of 3, 5, 6 and 7 bits, table blocks
that run across the ends of rows) are rebuilt too, at any number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from graphwright.ir.kernels import Kernel, blocks, table, tuning
from graphwright.ir.kernels.common import all_floats, as_rows
from graphwright.ir.kernels.epilogue import Epilogue, fits_epilogue
from graphwright.ir.kernels.gemm_tiles import (
    PROGRAMS,
    compute_type,
    grid_of,
    precision,
    split_for,
    sums_for,
)
from graphwright.ir.kernels.low_bit import gemm_kernel, gemv_kernel
from graphwright.ir.kernels.tuning import Tiles

DENSE_FROM = 512
"""Tokens from which the weight is rebuilt. Estimated: a tile's decoding takes the issue slots of
the product from about four tiles of 128 tokens on. Not measured."""

LARGEST_PIECE = 256
GEMV_TOKENS = 2
"""Up to here a dot product decodes a weight in fewer instructions than a tile of 16 tokens."""
MOST_GEMV_TOKENS = 4
"""Tokens that a dot product has registers for."""


@dataclass(frozen=True)
class Packed:
    """A weight of the kernels: rows of bytes, seen as pieces that share a scale.

    Attributes:
        codes: contiguous uint8, `n` rows of equal length.
        scale: (n, scales); a scale stands for `repeat` pieces.
        zero_point: packed like the codes of a row, or None.
        bits: of a code: 2, 4 or 8.
        piece: columns of a piece, a power of two from 16 on.
        repeat: pieces to a scale.
        table: `nf4` or `fp4`, or empty for codes that are numbers.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    piece: int
    repeat: int
    table: str = ""

    @property
    def n(self) -> int:
        """Output channels."""
        return self.scale.shape[0]

    @property
    def pieces(self) -> int:
        """In a row."""
        return self.scale.shape[1] * self.repeat

    @property
    def row_bytes(self) -> int:
        """Of codes."""
        return self.pieces * self.piece * self.bits // 8

    def words(self) -> Tensor:
        """The codes as int32; copied when they begin in the middle of a word."""
        codes = self.codes if self.codes.storage_offset() % 4 == 0 else self.codes.clone()
        return codes.view(torch.int32)


@functools.cache
def level_values(name: str) -> tuple[float, ...]:
    """The levels of a table as constants of a kernel."""
    from graphwright.ir.ops.table import levels

    return tuple(levels(name).tolist())


def piece_of(block: int) -> int:
    """The largest piece that divides a block: a power of two; 0 when that is less than 16."""
    piece = min(block & -block, LARGEST_PIECE)
    return piece if piece >= 16 else 0


def gemv_tiles(m: int, n: int, bits: int) -> list[Tiles]:
    """Many rows share what is read of x; few rows make more programs of a small weight, and leave
    registers to more tokens."""
    step = 1024 if bits >= 4 else 2048
    if m > GEMV_TOKENS:
        return [Tiles(m, 8, step, 4, 1, 1), Tiles(m, 4, step, 4, 1, 1)]
    many = [Tiles(m, 16, step, 4, 1, 1), Tiles(m, 16, step, 4, 1, 2)]
    few = [Tiles(m, 8, step, 4, 1, 1), Tiles(m, 4, 2 * step, 4, 1, 1)]
    return many + few if triton.cdiv(n, 16) >= PROGRAMS else few[:1] + many + few[1:]


def gemm_tiles(m: int) -> list[Tiles]:
    """Few tokens: small tiles, many programs. More: tiles that keep the tensor cores fed."""
    if m <= 16:
        return [Tiles(16, 64, 128, 4, 4), Tiles(16, 64, 64, 4, 4), Tiles(16, 128, 64, 4, 3)]
    if m <= 128:
        return [Tiles(64, 128, 64, 4, 3), Tiles(32, 64, 128, 4, 3), Tiles(64, 64, 64, 4, 4)]
    return [Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3)]


def linear(x: Tensor, packed: Packed, epilogue: Epilogue) -> Tensor:
    """y (..., n) = epilogue(x @ weight.T) for fewer than `DENSE_FROM` tokens."""
    rows = as_rows(x)
    m, n = rows.shape[0], packed.n
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)

    def run(tiles: Tiles) -> None:
        if tiles.block_m <= MOST_GEMV_TOKENS:
            _gemv(rows, packed, epilogue, y, tiles)
        else:
            _gemm(rows, packed, epilogue, y, tiles)

    kind = (tuning.bucket(m), n, rows.shape[1], packed.bits, packed.piece, packed.repeat,
            packed.table, packed.zero_point is not None, x.dtype)  # fmt: skip
    exact = _is_exact(x)
    candidates = _candidates(m, packed, exact)
    run(tuning.choose("low_bit", (*kind, exact), candidates, run, x.device))
    return y.view(*x.shape[:-1], n)


def _is_exact(x: Tensor) -> bool:
    """Whether products must be in float32 outside of tensor cores: tiles of such products spill
    kilobytes of registers. The interpreter has none to spill."""
    return x.is_cuda and x.dtype == torch.float32 and precision() == "ieee"


def takes(x: Tensor) -> bool:
    """Whether a kernel of ours should do the product of these tokens."""
    m = x.numel() // x.shape[-1]
    return m <= MOST_GEMV_TOKENS if _is_exact(x) else m < DENSE_FROM


def _candidates(m: int, packed: Packed, exact: bool = False) -> Sequence[Tiles]:
    tokens = tuning.bucket(m)
    if m <= GEMV_TOKENS or exact:
        return gemv_tiles(tokens, packed.n, packed.bits)
    if m <= MOST_GEMV_TOKENS:  # which is better depends on the table and on the device
        dots = gemv_tiles(tokens, packed.n, packed.bits)
        return dots + gemm_tiles(m) if packed.table else gemm_tiles(m) + dots
    return gemm_tiles(m)


def _gemv(rows: Tensor, packed: Packed, epilogue: Epilogue, y: Tensor, tiles: Tiles) -> None:
    (m, k), n = rows.shape, packed.n
    words = packed.piece * packed.bits // 32
    step = max(1, tiles.block_k // packed.piece)
    step = min(step, triton.next_power_of_2(packed.pieces))
    split = min(tiles.split, triton.cdiv(packed.pieces, step))
    partial = sums_for(m, n, split, y.device)
    zero = packed.codes if packed.zero_point is None else packed.zero_point
    levels = table.levels_on(packed.table, y.device) if packed.table else partial
    gemv_kernel[(triton.cdiv(n, tiles.block_n), split)](
        rows, packed.words(), packed.scale, zero, levels,
        *epilogue.tensors(partial), y, partial,
        m, n, k, packed.pieces, packed.repeat, zero.shape[-1], epilogue.rank, rows.stride(0),
        TABLE=bool(packed.table), BITS=packed.bits, HAS_ZERO=packed.zero_point is not None,
        **epilogue.constants(), SPLIT=split, TOKENS=tiles.block_m,
        ROWS=tiles.block_n, PIECES=step, WORDS=words, num_warps=tiles.warps,
    )  # fmt: skip
    if split > 1:
        epilogue.sum_parts(partial, y)


def _gemm(rows: Tensor, packed: Packed, epilogue: Epilogue, y: Tensor, tiles: Tiles) -> None:
    (m, k), n = rows.shape, packed.n
    block_k = min(tiles.block_k, packed.piece)
    split = split_for(m, n, k, Tiles(tiles.block_m, tiles.block_n, block_k, 0, 0))
    partial = sums_for(m, n, split, y.device)
    zero = packed.codes if packed.zero_point is None else packed.zero_point
    gemm_kernel[grid_of(m, n, tiles, split)](
        rows, packed.codes, packed.scale, zero, *epilogue.tensors(partial), y, partial,
        m, n, k, packed.pieces, packed.repeat, packed.row_bytes, zero.shape[-1], epilogue.rank,
        rows.stride(0),
        LEVELS=level_values(packed.table) if packed.table else (), BITS=packed.bits,
        HAS_ZERO=packed.zero_point is not None,
        PIECE=packed.piece, **epilogue.constants(), COMPUTE=compute_type(rows),
        PRECISION=precision(), SPLIT=split, GROUP=8,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if split > 1:
        epilogue.sum_parts(partial, y)


def _dense(x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    y = epilogue.after_dense(as_rows(x), weight.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


def _fits_blocks(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None, bits: int, *_: Any,
) -> bool:  # fmt: skip
    weight = codes.dtype == torch.uint8 and 2 <= bits <= 8 and all_floats(scale)
    return weight and x.numel() > 0 and fits_epilogue(x, bias, low, b, added)


def _launch_blocks(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    bits: int, block: int, activation: str,
) -> Tensor:  # fmt: skip
    epilogue = Epilogue.of(bias, low, b, added, activation)
    columns, piece = x.shape[-1], piece_of(block)
    if not takes(x) or not piece or bits not in (2, 4, 8):
        weight = blocks.dequantize_blocks.launch(codes, scale, zero_point, bits, block, columns)
        return _dense(x, weight, epilogue)
    zero = None if zero_point is None else zero_point.contiguous()
    packed = Packed(codes.contiguous(), scale.contiguous(), zero, bits, piece, block // piece)
    return linear(x, packed, epilogue)


def _fits_table(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None, *_: Any,
) -> bool:  # fmt: skip
    weight = codes.dtype == torch.uint8 and all_floats(scale)
    return weight and x.numel() > 0 and fits_epilogue(x, bias, low, b, added)


def _launch_table(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    name: str, block: int, rows: int, activation: str,
) -> Tensor:  # fmt: skip
    from graphwright.ir.ops.table import BITS

    epilogue = Epilogue.of(bias, low, b, added, activation)
    columns, piece = x.shape[-1], piece_of(block)
    if not takes(x) or not piece or columns % block or BITS[name] != 4:
        weight = table.dequantize_table.launch(codes, scale, name, block, [rows, columns])
        return _dense(x, weight, epilogue)
    scales = scale.contiguous().view(rows, -1)
    packed = Packed(codes.contiguous(), scales, None, 4, piece, block // piece, name)
    return linear(x, packed, epilogue)


blocks_linear = Kernel(_fits_blocks, _launch_blocks)
table_linear = Kernel(_fits_table, _launch_table)
