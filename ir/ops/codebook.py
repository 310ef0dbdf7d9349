"""graphwright::dequantize_codebook: a weight stored as indices into codebooks of short vectors.

A vector stands for v neighbouring rows (output channels) of one column. The columns are cut into
as many equal groups as there are codebooks:

    weight[r * v + e, c] = codebooks[c * groups // columns, index[r, c], e]

Sums of codebooks (residuals), several sizes of them side by side, scales, biases and permutations
of columns are ordinary calls around this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare

MOST_BITS = 16
"""Bits of the widest index."""


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of indices takes."""
    return (columns * bits + 7) // 8


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Bytes (rows, packed_width) of indices (rows, columns): a string of bits, low bits first.

    Raises:
        ValueError: an index does not fit `bits`.
    """
    if indices.numel() and int(indices.max()) >= 2**bits:
        raise ValueError(f"index {int(indices.max())} does not fit {bits} bits")
    wide = indices.to(torch.int32)
    if bits % 8 == 0:
        parts = [(wide >> shift) & 255 for shift in range(0, bits, 8)]
        return torch.stack(parts, -1).flatten(1).to(torch.uint8)
    string = ((wide.unsqueeze(-1) >> torch.arange(bits)) & 1).to(torch.uint8).flatten(1)
    width = packed_width(indices.shape[1], bits)
    string = torch.nn.functional.pad(string, (0, width * 8 - string.shape[1]))
    weights = (1 << torch.arange(8)).to(torch.uint8)
    packed: Tensor = (string.unflatten(1, (width, 8)) * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack_indices(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Indices (rows, columns) int32 from bytes (rows, packed_width)."""
    wide = packed.to(torch.int32)
    start = torch.arange(columns, device=packed.device) * bits
    first, last = start // 8, packed.shape[1] - 1
    word = wide[:, first]
    for byte in range(1, _bytes_of(bits)):
        word = word | (wide[:, (first + byte).clamp(max=last)] << (8 * byte))
    return (word >> (start % 8).to(torch.int32)) & ((1 << bits) - 1)


def _bytes_of(bits: int) -> int:
    """Bytes that an index of `bits` bits may lie in."""
    return bits // 8 if bits % 8 == 0 else (bits + 6) // 8 + 1


def _eager(indices: Tensor, codebooks: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    groups, size, width = codebooks.shape
    index = unpack_indices(indices, bits, columns)
    if groups > 1:
        index = index + torch.arange(columns, device=index.device) * groups // columns * size
    found = codebooks.reshape(-1, width)[index.long()]
    return found.transpose(1, 2).reshape(-1, columns)[:rows]


def _meta(indices: Tensor, codebooks: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    return torch.empty((rows, columns), dtype=codebooks.dtype, device=codebooks.device)


def _onnx(indices: Any, codebooks: Any, bits: int, rows: int, columns: int) -> Any:
    from onnxscript import opset18 as op

    groups, size, width = (int(n) for n in codebooks.shape)

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    index = _onnx_indices(indices, bits, columns)
    if groups > 1:
        # Made of small parts: constants as long as a row would outgrow the indices.
        column = op.Range(*(op.Constant(value_int=v) for v in (0, columns, 1)))
        group = op.Div(op.Mul(column, ints(groups)), ints(columns))
        index = op.Add(op.Cast(index, to=7), op.Mul(group, ints(size)))
    found = op.Gather(op.Reshape(codebooks, ints(-1, width)), index)
    flat = op.Reshape(op.Transpose(found, perm=[0, 2, 1]), ints(-1, columns))
    return op.Slice(flat, ints(0), ints(rows), ints(0))


def _onnx_indices(packed: Any, bits: int, columns: int) -> Any:
    """ONNX form of `unpack_indices`."""
    import onnx
    from onnxscript import opset18 as op

    def ints(value: int) -> Any:
        return op.Constant(value_ints=[value])

    wide = op.Cast(packed, to=onnx.TensorProto.INT32)
    if bits == 8:
        return wide
    start = op.Mul(op.Range(*(op.Constant(value_int=v) for v in (0, columns, 1))), ints(bits))
    first, last = op.Div(start, ints(8)), ints(int(packed.shape[1]) - 1)
    word = op.Gather(wide, first, axis=1)
    for byte in range(1, _bytes_of(bits)):
        more = op.Gather(wide, op.Min(op.Add(first, ints(byte)), last), axis=1)
        scale = op.Cast(ints(1 << (8 * byte)), to=onnx.TensorProto.INT32)
        word = op.Add(word, op.Mul(more, scale))
    unsigned = op.Cast(word, to=onnx.TensorProto.UINT32)
    shift = op.Cast(op.Mod(start, ints(8)), to=onnx.TensorProto.UINT32)
    mask = op.Cast(ints((1 << bits) - 1), to=onnx.TensorProto.UINT32)
    index = op.BitwiseAnd(op.BitShift(unsigned, shift, direction="RIGHT"), mask)
    return op.Cast(index, to=onnx.TensorProto.INT32)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def sample(
        rows: int, columns: int, bits: int, width: int, size: int, groups: int = 1
    ) -> tuple[Any, ...]:
        shape = (-(-rows // width), columns)
        index = torch.randint(0, size, shape, generator=generator)
        values = torch.randint(-128, 128, (groups, size, width), generator=generator) / 64
        return pack_indices(index, bits), values, bits, rows, columns

    yield sample(37, 75, 12, 4, 3000)
    yield sample(64, 130, 8, 8, 256)
    yield sample(30, 48, 16, 6, 300, groups=3)
    yield sample(9, 33, 5, 2, 32, groups=11)
    yield sample(7, 20, 9, 1, 512, groups=2)


dequantize_codebook = declare(
    "dequantize_codebook(Tensor indices, Tensor codebooks, int bits, int rows, int columns) "
    "-> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.codebook:dequantize_codebook",
    samples=_samples,
)
"""Weight (rows, columns) in the dtype of the codebooks.

indices: uint8 (ceil(rows / v), ceil(columns * bits / 8)), each row a string of indices of `bits`
bits (1 to 16), low bits first; codebooks: (groups, k, v) with k <= 2 ** bits and columns a multiple
of groups. Vectors that reach past the last row are cut off.
"""
