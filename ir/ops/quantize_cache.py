"""graphwright::quantize_cache: keys or values on the grid of a quantized cache, as floats.

    y = s clamp(round(x / s), -m, m),    m = 127 for 8 bits, 7 for 4

or, for 16 bits, the nearest half-precision number. s is one scale per head and channel, found from
data beforehand, or, where there is none, the largest value of the token's head over m. A program
holds this op in front of every new part of a cache, so that it computes what an artifact does that
stores codes; a runtime whose attention reads codes stores these.

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", section
3: keys have outlying channels and want scales per channel, values want scales per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare

HALF = 65504.0
"""Largest half-precision number."""

SMALLEST = 1e-8
"""Least scale: a head of zeros has codes of zeros."""


def largest_code(bits: int) -> int:
    """Codes run from minus this to this."""
    return int(2 ** (bits - 1)) - 1


def token_scale(x: Tensor, bits: int) -> Tensor:
    """(..., 1) scales of the last axis of `x`, in float32, or in float64 for such."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide.abs().amax(-1, keepdim=True) / largest_code(bits)).clamp_min(SMALLEST)


def cache_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Whole numbers (in the scale's dtype) for `x` under a scale that broadcasts to it."""
    most = largest_code(bits)
    return torch.round(x.to(scale.dtype) / scale).clamp(-most, most)


def cache_step(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """Distance between neighbouring numbers that `x` can become, broadcasting to it."""
    if bits == 16:
        return x.detach().float().abs() * 2.0**-10 + 2.0**-24
    return token_scale(x.detach(), bits) if scale is None else scale.detach()


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF, HALF).to(torch.float16).to(x.dtype)


def _eager(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    if bits == 16:
        return _half(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = token_scale(x.detach(), bits) if scale is None else scale.detach().to(wide)
    value = cache_codes(x.detach(), found, bits) * found
    if not x.requires_grad:
        return value.to(x.dtype)
    most = largest_code(bits) * found
    inside = torch.minimum(torch.maximum(x.to(wide), -most), most)
    return (value + (inside - inside.detach())).to(x.dtype)  # the rounding lets gradients through


def _meta(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _onnx(x: Any, scale: Any, bits: int) -> Any:
    from onnxscript import FLOAT, FLOAT16
    from onnxscript import opset18 as op

    most = HALF if bits == 16 else float(largest_code(bits))
    high, low = op.Constant(value_float=most), op.Constant(value_float=-most)
    wide = op.Cast(x, to=FLOAT.dtype)
    if bits == 16:
        return op.CastLike(op.Cast(op.Clip(wide, low, high), to=FLOAT16.dtype), x)
    if scale is None:
        peak = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
        scale = op.Max(op.Div(peak, high), op.Constant(value_float=SMALLEST))
    else:
        scale = op.Cast(scale, to=FLOAT.dtype)
    codes = op.Clip(op.Round(op.Div(wide, scale)), low, high)
    return op.CastLike(op.Mul(codes, scale), x)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, bits, is_static in (
        ((2, 3, 5, 16), 8, True), ((1, 2, 7, 20), 4, False), ((2, 1, 1, 64), 8, False),
        ((1, 1, 3, 8), 16, False), ((3, 2, 4, 8), 4, True),
    ):  # fmt: skip
        x = torch.randn(shape, generator=generator) * 3
        peak = 2 + torch.rand((shape[1], 1, shape[3]), generator=generator)
        # a power of two under the scale: no quotient lies where roundings of it part
        scale = torch.exp2(torch.round(torch.log2(peak / largest_code(bits))))
        yield x, scale if is_static else None, bits


quantize_cache = declare(
    "quantize_cache(Tensor x, Tensor? scale, int bits) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.quantize_cache:quantize_cache",
    samples=_samples,
)
"""x (batch, heads, tokens, size), scale (heads, 1, size) or None, bits 16, 8 or 4: like x."""
