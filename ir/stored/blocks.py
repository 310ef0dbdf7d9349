"""A weight as packed codes: made from codes, scales and zero points, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from graphwright.ir.ops.blocks import (
    PIECE,
    dequantize_blocks,
    pack_codes,
    unpack_codes,
    unpack_zero_points,
)
from graphwright.ir.stored import grid as grid_math

BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Blocks:
    """A matrix (out, columns) with one scale and zero point per row and block of columns.

    The layout is that of `graphwright::dequantize_blocks`.

    Attributes:
        codes: uint8 (out, k_blocks, ceil(block * bits / 8)), low bits first.
        scale: float (out, k_blocks).
        zero_point: uint8 (out, ceil(k_blocks * bits / 8)); None means 2 ** (bits - 1).
        bits: 2 to 8.
        block: columns that share a scale.
        columns: columns of the matrix; the last block may reach past them.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    block: int
    columns: int

    def value(self) -> Tensor:
        """The matrix (out, columns) in the dtype of the scales."""
        value: Tensor = dequantize_blocks(
            self.codes, self.scale, self.zero_point, self.bits, self.block, self.columns
        )
        return value

    def split(self, rows: int) -> Iterator[Blocks]:
        """The same of at most `rows` rows at a time."""
        for at in range(0, max(len(self.codes), 1), rows):
            yield self.through(itemgetter(slice(at, at + rows)))

    def through(self, function: Callable[[Tensor], Tensor]) -> Blocks:
        """The same with what a function makes of each tensor."""
        zero = None if self.zero_point is None else function(self.zero_point)
        return replace(
            self, codes=function(self.codes), scale=function(self.scale), zero_point=zero
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero_point) if t is not None)


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, block: int) -> Blocks:
    """Packs codes (out, columns) with their scales and zero points (out, k_blocks).

    Args:
        q: uint8 codes, each below 2 ** bits.
        scale: float; k_blocks = ceil(columns / block).
        zero: uint8 zero points; None for 2 ** (bits - 1) everywhere.
        bits: 2 to 8.
        block: columns per scale, at least 1.

    Raises:
        ValueError: shapes that do not belong together, or a code that does not fit.
    """
    out, columns = q.shape
    blocks = -(-columns // block)
    if bits not in BITS:
        raise ValueError(f"{bits} bits; 2 to 8 can be packed")
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tuple(tensor.shape) != (out, blocks):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {(out, blocks)}")
    padded = torch.nn.functional.pad(q, (0, blocks * block - columns))
    codes = pack_codes(padded.reshape(out, blocks, block), bits)
    zero_point = None if zero is None else pack_codes(zero, bits)
    return Blocks(codes, scale.contiguous(), zero_point, bits, block, columns)


def unpack(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, columns) uint8, scales and zero points (out, k_blocks), the latter uint8."""
    codes = unpack_codes(blocks.codes, blocks.block, blocks.bits).flatten(1)
    zero = unpack_zero_points(blocks.zero_point, blocks.scale, blocks.bits)
    if isinstance(zero, int):
        zero = torch.full_like(blocks.scale, zero, dtype=torch.uint8)
    return codes[:, : blocks.columns].contiguous(), blocks.scale, zero.contiguous()


def block_for(columns: int, block: int) -> int:
    """Columns per scale that rows of `columns` get when `block` are asked for.

    Less than 1 asks for one scale per row. A row of less than half a block gets a
    smaller one, halved as long as it is a power of two above 16, so that little is stored for
    columns that are not there.
    """
    if block < 1:
        return max(columns, 1)
    while block > 16 and block & (block - 1) == 0 and block >= 2 * columns:
        block //= 2
    return block


def round_to_nearest(
    matrix: Tensor, bits: int, block: int, *, symmetric: bool = False, search: bool = False
) -> Blocks:
    """Every weight as the nearest code of its block's grid.

    Args:
        matrix: (out, columns), a float type; the scales are of the same.
        bits: 2 to 8.
        block: columns per scale, at least 1.
        symmetric, search: as for `grid_math.fit`.
    """
    rows = max(1, PIECE // max(matrix.shape[1], 1))
    if len(matrix) > rows:  # a row's codes depend on no other row
        parts = [
            round_to_nearest(piece, bits, block, symmetric=symmetric, search=search)
            for piece in matrix.split(rows)
        ]
        return _joined(parts)
    wide = grid_math.grouped(matrix.detach().float(), block)
    scale, zero = grid_math.fit(wide, bits, symmetric=symmetric, search=search)
    # Codes are those of the scale that is stored.
    stored = scale.clamp(min=torch.finfo(matrix.dtype).tiny).to(matrix.dtype)
    codes = grid_math.encode(wide, stored.float()[..., None], zero[..., None], bits)
    q = codes.flatten(1)[:, : matrix.shape[1]].to(torch.uint8)
    return pack(q, stored, None if symmetric else zero.to(torch.uint8), bits, block)


def _joined(parts: list[Blocks]) -> Blocks:
    """Matrices below each other, of one form."""
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zeros) if zeros else None,
    )
