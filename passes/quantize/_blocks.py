"""A weight as packed codes: made from codes, scales and zero points, and read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.ops.blocks import (
    dequantize_blocks,
    packed_bytes,
    unpack_codes,
    unpack_zero_points,
)

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

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero_point) if t is not None)


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Bytes (..., ceil(n * bits / 8)) of codes (..., n) uint8, low bits first.

    Raises:
        ValueError: a code does not fit `bits`.
    """
    if bits < 8 and q.numel() and int(q.max()) >= 2**bits:
        raise ValueError(f"code {int(q.max())} does not fit {bits} bits")
    shifts = torch.arange(bits, dtype=torch.uint8)
    string = ((q.to(torch.uint8).unsqueeze(-1) >> shifts) & 1).flatten(-2)
    size = packed_bytes(q.shape[-1], bits)
    string = torch.nn.functional.pad(string, (0, size * 8 - string.shape[-1]))
    weights = 1 << torch.arange(8, dtype=torch.uint8)
    return (string.unflatten(-1, (size, 8)) * weights).sum(-1, dtype=torch.uint8)


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
        zero = torch.full(tuple(blocks.scale.shape), zero, dtype=torch.uint8)
    return codes[:, : blocks.columns].contiguous(), blocks.scale, zero.contiguous()
