"""graphwright::dequantize_float8, fake_quantize_float8: weights and activations in float8 e4m3.

e4m3 has 4 exponent and 3 mantissa bits, no infinity, values up to 448, and steps of 2^-9 below
2^-6. A weight is stored as the bytes of its float8 values and one scale per tensor or per channel.
An activation is divided by a scale, rounded to the nearest float8 (ties to even, saturating), and
multiplied again, so that a program computes in float what float8 kernels compute.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare

LARGEST = 448.0
"""Largest float8 e4m3 value."""


def bytes_of(x: Tensor) -> Tensor:
    """The nearest float8 e4m3 of every value, saturating, as uint8."""
    return x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


# ---- dequantize_float8


def _dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    value = codes.contiguous().view(torch.float8_e4m3fn).to(scale.dtype)
    if scale.dim() == 0:
        return value * scale
    shape = [-1 if i == axis % codes.dim() else 1 for i in range(codes.dim())]
    return value * scale.reshape(shape)


def _dequantize_meta(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


def _dequantize_onnx(codes: Any, scale: Any, axis: int) -> Any:
    """A lookup of the 256 values: the standard float8 types need opset 19."""
    from onnxscript import opset18 as op

    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = op.Constant(value_floats=torch.nan_to_num(values).tolist())
    found = op.Cast(op.Gather(table, op.Cast(codes, to=6)), to=int(scale.dtype))
    if len(scale.shape) == 0:
        return op.Mul(found, scale)
    rank = len(codes.shape)
    shape = [-1 if i == axis % rank else 1 for i in range(rank)]
    return op.Mul(found, op.Reshape(scale, op.Constant(value_ints=shape)))


def _dequantize_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return bytes_of(torch.randn(shape, generator=generator) * 90)

    scale = torch.rand(37, generator=generator) / 127
    yield codes(37, 75), scale, 0
    yield codes(5, 37, 3), scale, 1
    yield codes(40, 13) // 16, torch.tensor(0.02), 0
    yield codes(7, 3, 3, 3), torch.tensor(0.02), 0
    yield codes(300, 37).T, scale, 0


dequantize_float8 = declare(
    "dequantize_float8(Tensor codes, Tensor scale, int axis) -> Tensor",
    eager=_dequantize,
    meta=_dequantize_meta,
    onnx=_dequantize_onnx,
    kernel="graphwright.ir.kernels.float8:dequantize_float8",
    samples=_dequantize_samples,
)
"""Weight, in the dtype of the scale, from bytes of float8 e4m3 (uint8) and one scale, or one per
index of `axis`."""


# ---- fake_quantize_float8


def row_scale(x: Tensor) -> Tensor:
    """(..., 1): max|x| / 448 of every row of the last axis; 1 for a row of zeros."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))


def _fake(x: Tensor, scale: float) -> Tensor:
    wide = x.to(torch.float32)
    if x.numel() == 0:
        return x.clone()
    step = torch.tensor(scale, device=x.device) if scale > 0 else row_scale(wide)
    inside = torch.clamp(wide / step, -LARGEST, LARGEST)
    rounded = inside.detach().to(torch.float8_e4m3fn).to(torch.float32)
    if torch.is_grad_enabled() and x.requires_grad:
        rounded = rounded.detach() + (inside - inside.detach())
    return (rounded * step).to(x.dtype)


def _fake_meta(x: Tensor, scale: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_onnx(x: Any, scale: float) -> Any:
    """Rounding in float32 arithmetic. A step of 2^-3 of the power of two below |x| is found by
    taking away and adding the same number; a tie may go the other way than in the other faces."""
    import onnx
    from onnxscript import opset18 as op

    wide = op.Cast(x, to=onnx.TensorProto.FLOAT)
    if scale > 0:
        step = op.Constant(value_float=scale)
    else:
        axes = op.Constant(value_ints=[-1])
        largest = op.ReduceMax(op.Abs(wide), axes, keepdims=1)
        zero, one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
        step = op.Where(
            op.Greater(largest, zero), op.Div(largest, op.Constant(value_float=LARGEST)), one
        )
    inside = op.Clip(
        op.Div(wide, step), op.Constant(value_float=-LARGEST), op.Constant(value_float=LARGEST)
    )
    large = op.Mul(inside, op.Constant(value_float=float(2**20 + 1)))
    normal = op.Sub(large, op.Sub(large, inside))
    fine = op.Constant(value_float=2.0**-9)
    small = op.Mul(op.Round(op.Div(inside, fine)), fine)
    limit = op.Constant(value_float=2.0**-6)
    rounded = op.Where(op.Less(op.Abs(inside), limit), small, normal)
    return op.CastLike(op.Mul(rounded, step), x)


def _fake_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        # No value is near a tie in any format.
        size = 2.0 ** torch.randint(-9, 9, shape, generator=generator)
        parts = 1 + torch.randint(0, 8, shape, generator=generator) / 8 + 1 / 64
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return size * parts * signs

    yield values(3, 17, 5), 1.0
    yield values(1), 0.5
    yield values(40, 9).T, 0.25
    row = values(5, 33)
    row[:, 0] = 512.0 + 64  # saturates
    yield row, 1.0
    rows = values(6, 130).clamp(-400, 400)
    rows[:, 7], rows[2] = 448.0, 0.0
    yield rows, 0.0


fake_quantize_float8 = declare(
    "fake_quantize_float8(Tensor x, float scale) -> Tensor",
    eager=_fake,
    meta=_fake_meta,
    onnx=_fake_onnx,
    kernel="graphwright.ir.kernels.float8:fake_quantize_float8",
    samples=_fake_samples,
)
"""Activation to float8 e4m3 and back, with one scale; 0: with max|x| / 448 of every row."""
