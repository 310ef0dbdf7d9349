"""graphwright::dequantize_blocks: a weight stored as 2 to 8 bit codes with a scale per block.

A row of the weight (one output channel) is cut into blocks of equal length along the inner
dimension; the last block may reach past the end. Each block has one scale and one zero point:

    weight[o, c] = (code[o, c] - zero_point[o, c // block]) * scale[o, c // block]

Codes are packed as ONNX Runtime's MatMulNBits reads them: per block a string of bits, low bits
first, filled up to whole bytes. So element i of a block has bits i*bits .. (i+1)*bits - 1 of the
block's bytes, the low bit of byte 0 being bit 0. Zero points are packed the same way along a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def bit_places(count: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The place of code i: (first byte, its right shift, second byte, its left shift), each
    (count,).

    code = ((first >> right) | (second << left)) & mask in 8-bit arithmetic. A code that begins
    at the low bit of a byte never needs a second one, and gets the same byte unshifted.
    """
    start = torch.arange(count) * bits
    first, right = start // 8, start % 8
    last = max(packed_bytes(count, bits) - 1, 0)
    second = torch.where(right > 0, (first + 1).clamp(max=last), first)
    return first, right.to(torch.uint8), second, ((8 - right) % 8).to(torch.uint8)


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Bytes (..., ceil(n * bits / 8)) of codes (..., n) uint8, low bits first.

    Raises:
        ValueError: a code does not fit `bits`.
    """
    if bits < 8 and q.numel() and int(q.max()) >= 2**bits:
        raise ValueError(f"code {int(q.max())} does not fit {bits} bits")
    if 8 % bits == 0:  # whole codes to a byte
        each = 8 // bits
        filled = torch.nn.functional.pad(q.to(torch.uint8), (0, -q.shape[-1] % each))
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=q.device)
        whole: Tensor = (filled.unflatten(-1, (-1, each)) << places).sum(-1, dtype=torch.uint8)
        return whole
    shifts = torch.arange(bits, dtype=torch.uint8, device=q.device)
    string = ((q.to(torch.uint8).unsqueeze(-1) >> shifts) & 1).flatten(-2)
    size = packed_bytes(q.shape[-1], bits)
    string = torch.nn.functional.pad(string, (0, size * 8 - string.shape[-1]))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=q.device)
    packed: Tensor = (string.unflatten(-1, (size, 8)) * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """Codes (..., count) uint8 from bytes (..., packed_bytes(count, bits))."""
    mask = 2**bits - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        spread: Tensor = (packed.unsqueeze(-1) >> shifts) & mask
        return spread.flatten(-2)[..., :count]
    first, right, second, left = (t.to(packed.device) for t in bit_places(count, bits))
    codes: Tensor = ((packed[..., first] >> right) | (packed[..., second] << left)) & mask
    return codes


def unpack_zero_points(zero_point: Tensor | None, scale: Tensor, bits: int) -> Tensor | int:
    """Zero points (out, k_blocks) uint8; the middle of the range where none are stored."""
    if zero_point is None:
        return 1 << (bits - 1)
    return unpack_codes(zero_point, scale.shape[1], bits)


PIECE = 1 << 22
"""Weights that are rebuilt at a time: what is between codes and floats is as large as the result,
several times over."""


def _eager(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, columns: int
) -> Tensor:
    rows = max(1, PIECE // max(columns, 1))
    if len(codes) <= rows or (torch.is_grad_enabled() and scale.requires_grad):
        return _rebuilt(codes, scale, zero_point, bits, block, columns)
    value = torch.empty((len(codes), columns), dtype=scale.dtype, device=codes.device)
    for at in range(0, len(codes), rows):
        part = slice(at, at + rows)
        zero = None if zero_point is None else zero_point[part]
        value[part] = _rebuilt(codes[part], scale[part], zero, bits, block, columns)
    return value


def _rebuilt(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, columns: int
) -> Tensor:
    value = unpack_codes(codes, block, bits).to(scale.dtype)
    zero = unpack_zero_points(zero_point, scale, bits)
    if isinstance(zero, Tensor):
        zero = zero.to(scale.dtype).unsqueeze(-1)
    return ((value - zero) * scale.unsqueeze(-1)).flatten(1)[:, :columns]


def _meta(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, columns: int
) -> Tensor:
    return torch.empty((codes.shape[0], columns), dtype=scale.dtype, device=codes.device)


def onnx_codes(packed: Any, count: int, bits: int) -> Any:
    """ONNX form of `unpack_codes`: bytes (..., packed) to codes (..., count) uint8."""
    from onnxscript import opset18 as op

    first, right, second, left = bit_places(count, bits)
    low = op.BitShift(
        op.Gather(packed, _ints(first), axis=-1), _bytes(right.tolist()), direction="RIGHT"
    )
    if 8 % bits:
        high = op.BitShift(
            op.Gather(packed, _ints(second), axis=-1), _bytes(left.tolist()), direction="LEFT"
        )
        low = op.BitwiseOr(low, high)
    return op.BitwiseAnd(low, _bytes([2**bits - 1]))


def _ints(values: Tensor) -> Any:
    from onnxscript import opset18 as op

    return op.Constant(value_ints=values.tolist())


def _bytes(values: list[int]) -> Any:
    import onnx
    from onnxscript import opset18 as op

    made = onnx.helper.make_tensor("bytes", onnx.TensorProto.UINT8, [len(values)], values)
    return op.Constant(value=made)


def _onnx(codes: Any, scale: Any, zero_point: Any, bits: int, block: int, columns: int) -> Any:
    from onnxscript import opset18 as op

    blocks = int(scale.shape[1])
    # Cast, not CastLike: ONNX Runtime folds the one when it loads a model, and not the other.
    kind = int(scale.dtype)
    value = op.Cast(onnx_codes(codes, block, bits), to=kind)
    if zero_point is None:
        zero = op.Cast(op.Constant(value_float=float(1 << (bits - 1))), to=kind)
    else:
        zero = op.Cast(onnx_codes(zero_point, blocks, bits), to=kind)
        zero = op.Unsqueeze(zero, op.Constant(value_ints=[-1]))
    value = op.Mul(op.Sub(value, zero), op.Unsqueeze(scale, op.Constant(value_ints=[-1])))
    value = op.Reshape(value, op.Constant(value_ints=[-1, blocks * block]))
    if columns == blocks * block:
        return value
    start, end, axis = (op.Constant(value_ints=[v]) for v in (0, columns, 1))
    return op.Slice(value, start, end, axis)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def sample(out: int, columns: int, bits: int, block: int, has_zero: bool) -> tuple[Any, ...]:
        blocks = -(-columns // block)

        def random(*shape: int) -> Tensor:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        codes = random(out, blocks, packed_bytes(block, bits))
        scale = torch.rand(out, blocks, generator=generator) / 2**bits
        zero = random(out, packed_bytes(blocks, bits)) if has_zero else None
        return codes, scale, zero, bits, block, columns

    yield sample(37, 75, 4, 16, True)
    yield sample(5, 64, 2, 32, False)
    yield sample(17, 130, 3, 32, True)
    yield sample(9, 75, 5, 75, True)
    yield sample(3, 50, 6, 20, False)
    yield sample(1, 33, 7, 16, True)
    yield sample(37, 300, 8, 128, True)


dequantize_blocks = declare(
    "dequantize_blocks(Tensor codes, Tensor scale, Tensor? zero_point, int bits, int block, "
    "int columns) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.blocks:dequantize_blocks",
    samples=_samples,
)
"""Weight (out, columns), in the dtype of the scales.

codes: uint8 (out, k_blocks, ceil(block * bits / 8)); scale: (out, k_blocks); zero_point: uint8
(out, ceil(k_blocks * bits / 8)), or None for 2 ** (bits - 1); k_blocks = ceil(columns / block).
"""
