"""graphwright::dequantize, fake_quantize, fake_quantize_dynamic: what int8 programs are made of.

A quantized weight is stored as codes and rebuilt by `dequantize`, which feeds a plain layer. An
activation goes through one of the other two: quantized and back, so that a program computes in
float what the integer kernels compute. All three work in float32 whatever the type of x, divide by
the scale and round half to even: the definitions of ONNX QuantizeLinear, DequantizeLinear and
DynamicQuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare

# ---- dequantize


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Per-channel values (n,) shaped to broadcast along `axis`; a scalar stays one."""
    if values.dim() == 0:
        return values
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    value = codes.to(scale.dtype)
    if zero_point is not None:
        value = value - _along(zero_point, axis, codes.dim()).to(scale.dtype)
    return value * _along(scale, axis, codes.dim())


def _dequantize_meta(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


def _dequantize_onnx(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    from onnxscript import opset18 as op

    if zero_point is None:
        return op.DequantizeLinear(codes, scale, axis=axis)
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def _dequantize_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        low = 0 if dtype == torch.uint8 else -127
        return torch.randint(low, low + 255, shape, generator=generator).to(dtype)

    scale = torch.rand(37, generator=generator) / 127
    yield codes(37, 75), scale, None, 0
    yield codes(5, 37, 3), scale, None, 1
    yield codes(75, 37, dtype=torch.uint8), scale, codes(37, dtype=torch.uint8), -1
    yield codes(7, 3, 3, 3), torch.tensor(0.02), None, 0
    yield codes(300, 37).T, scale, None, 0


dequantize = declare(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int axis) -> Tensor",
    eager=_dequantize,
    meta=_dequantize_meta,
    onnx=_dequantize_onnx,
    kernel="graphwright.ir.kernels.quantize:dequantize",
    samples=_dequantize_samples,
)
"""Weight from codes (int8, uint8 or int32) and scales: one scale, or one per index of `axis`."""


# ---- fake quantization of activations


def quantize_with(x: Tensor, scale: Tensor | float, zero_point: Tensor | float,
                  low: int, high: int) -> Tensor:  # fmt: skip
    """Codes of x as floats: clamp(round_half_even(x / scale) + zero_point, low, high)."""
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def _straight_through(x: Tensor, quantized: Tensor, low: Any, high: Any) -> Tensor:
    """`quantized`, with the gradient of clamp(x): the derivative of round is taken to be 1."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return quantized
    inside = torch.clamp(x, low, high)
    return quantized.detach() + (inside - inside.detach())


def _fake_quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    wide = x.to(torch.float32)
    step = torch.tensor(scale, dtype=torch.float32, device=x.device)
    value = (quantize_with(wide, step, zero_point, low, high) - zero_point) * step
    limits = ((low - zero_point) * scale, (high - zero_point) * scale)
    return _straight_through(wide, value, *limits).to(x.dtype)


def _same(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_quantize_onnx(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
    import onnx
    from onnxscript import opset18 as op

    step = op.Constant(value_float=scale)
    kind = onnx.TensorProto.UINT8 if low >= 0 else onnx.TensorProto.INT8
    zero = op.Constant(value=onnx.helper.make_tensor("zero_point", kind, [], [zero_point]))
    wide = op.Cast(x, to=onnx.TensorProto.FLOAT)
    if (low, high) not in ((0, 255), (-128, 127)):
        # QuantizeLinear saturates at the limits of its type; a narrower range is clamped before.
        wide = op.Clip(
            wide,
            op.Constant(value_float=(low - zero_point) * scale),
            op.Constant(value_float=(high - zero_point) * scale),
        )
    return op.CastLike(op.DequantizeLinear(op.QuantizeLinear(wide, step, zero), step, zero), x)


def _values(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers whose half formats are exact and whose codes at scale 2**-4 are no ties."""
    return torch.randint(-40, 60, shape, generator=generator) / 16.0 + 1 / 64


def _fake_quantize_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    yield _values(generator, 3, 17, 5), 0.0625, 30, 0, 255
    yield _values(generator, 1), 0.0625, 0, -127, 127
    yield _values(generator, 40, 9).T, 0.0625, 0, -128, 127
    yield torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0]), 1.0, 100, 0, 255


fake_quantize = declare(
    "fake_quantize(Tensor x, float scale, int zero_point, int low, int high) -> Tensor",
    eager=_fake_quantize,
    meta=_same,
    onnx=_fake_quantize_onnx,
    kernel="graphwright.ir.kernels.quantize:fake_quantize",
    samples=_fake_quantize_samples,
)
"""Static activation quantizer: x to codes in [low, high] and back, with fixed parameters."""


def dynamic_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (0-dim float32) of the uint8 range of x, extended to hold 0.

    Source: ONNX DynamicQuantizeLinear-11; a tensor of zeros gets the scale 1.
    """
    low, high = torch.aminmax(x.detach())
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(torch.clamp(-low / scale, 0, 255))


def _fake_quantize_dynamic(x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    if x.numel() == 0:
        return wide.clone().to(x.dtype)
    scale, zero_point = dynamic_parameters(wide)
    value = (quantize_with(wide, scale, zero_point, 0, 255) - zero_point) * scale
    return _straight_through(wide, value, None, float("inf")).to(x.dtype)


def _fake_quantize_dynamic_onnx(x: Any) -> Any:
    import onnx
    from onnxscript import opset18 as op

    codes, scale, zero_point = op.DynamicQuantizeLinear(op.Cast(x, to=onnx.TensorProto.FLOAT))
    return op.CastLike(op.DequantizeLinear(codes, scale, zero_point), x)


def _fake_quantize_dynamic_samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    for shape in ((3, 17, 5), (1,), (33, 129)):
        values = _values(generator, *shape).flatten()
        # A range of 255/16 makes the scale 2**-4, so that no code is near a tie in any format.
        if values.numel() > 1:
            values[0], values[1] = -3.0, 12.9375
        yield (values.reshape(shape),)
    yield (torch.zeros(4, 3),)


fake_quantize_dynamic = declare(
    "fake_quantize_dynamic(Tensor x) -> Tensor",
    eager=_fake_quantize_dynamic,
    meta=_same,
    onnx=_fake_quantize_dynamic_onnx,
    kernel="graphwright.ir.kernels.quantize:fake_quantize_dynamic",
    samples=_fake_quantize_dynamic_samples,
)
"""Dynamic activation quantizer: uint8 codes with the range of this very tensor, and back."""
