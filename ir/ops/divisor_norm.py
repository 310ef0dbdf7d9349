"""graphwright::divisor_layer_norm: a layer norm over the channels that pruning has left.

The channels that were removed held exact zeros, and the norm still counts them: with d the
original width and d' the stored one, mu = sum(x) / d and
var = (sum((x - mu)^2) + (d - d') mu^2) / d. No affine change of an ordinary layer norm of width
d' gives the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare


def _eager(x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    mean = wide.sum(-1, keepdim=True) / width
    centred = wide - mean
    absent = width - x.shape[-1]
    variance = (centred.square().sum(-1, keepdim=True) + absent * mean.square()) / width
    wide = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        wide = wide * weight
    if bias is not None:
        wide = wide + bias
    return wide.to(x.dtype)


def _onnx(x: Any, weight: Any, bias: Any, width: int, eps: float) -> Any:
    from onnxscript import FLOAT
    from onnxscript import opset18 as op

    wide = op.Cast(x, to=FLOAT.dtype)
    axes = op.Constant(value_ints=[-1])
    count = op.Constant(value_float=float(width))
    mean = op.Div(op.ReduceSum(wide, axes, keepdims=1), count)
    centred = op.Sub(wide, mean)
    total = op.ReduceSum(op.Mul(centred, centred), axes, keepdims=1)
    kept = op.Cast(op.Shape(x, start=-1), to=FLOAT.dtype)
    absent = op.Mul(op.Sub(count, kept), op.Mul(mean, mean))
    variance = op.Div(op.Add(total, absent), count)
    shifted = op.Add(variance, op.Constant(value_float=eps))
    wide = op.Mul(centred, op.Reciprocal(op.Sqrt(shifted)))
    if weight is not None:
        wide = op.Mul(wide, op.Cast(weight, to=FLOAT.dtype))
    if bias is not None:
        wide = op.Add(wide, op.Cast(bias, to=FLOAT.dtype))
    return op.CastLike(wide, x)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 7, 75), generator=generator) + 0.5
    weight, bias = torch.randn((2, 75), generator=generator)
    yield x, weight, bias, 128, 1e-5
    yield x[:, 0], weight, None, 75, 1e-12
    yield x.transpose(0, 1), None, None, 100, 1e-5


divisor_layer_norm = declare(
    "divisor_layer_norm(Tensor x, Tensor? weight, Tensor? bias, int width, float eps) -> Tensor",
    eager=_eager,
    meta=lambda x, weight, bias, width, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    onnx=_onnx,
    kernel="graphwright.ir.kernels.divisor_norm:divisor_layer_norm",
    samples=_samples,
)
