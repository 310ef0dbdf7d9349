"""graphwright::add_layer_norm, add_rms_norm, rms_norm: norms over the last axis.

The two with a residual return (normalized, sum): the sum is what the next block adds to; where
nothing does, `keep_sum` is false, it is not written, and the second result is empty. It is
rounded to the stored dtype before it is normalized, as two separate ops would do. Statistics
and affine part are in float32, rounded once at the end, as in `torch.nn.functional.rms_norm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops.registry import declare


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = F.layer_norm(_wide(x), x.shape[-1:], _wide(weight), _wide(bias), eps)
    return wide.to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * _wide(weight)).to(x.dtype)


@overload
def _wide(x: Tensor) -> Tensor: ...
@overload
def _wide(x: None) -> None: ...
def _wide(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.float()


def _eager_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total if keep_sum else _empty(x)


def _eager_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool = True
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total if keep_sum else _empty(x)


def _empty(x: Tensor) -> Tensor:
    return torch.empty((0,), dtype=x.dtype, device=x.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _onnx_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    from onnxscript import FLOAT
    from onnxscript import opset18 as op

    wide = op.Cast(x, to=FLOAT.dtype)
    axes = op.Constant(value_ints=[-1])
    mean = op.ReduceMean(op.Mul(wide, wide), axes, keepdims=1)
    shifted = op.Add(mean, op.Constant(value_float=eps))
    wide = op.Mul(wide, op.Reciprocal(op.Sqrt(shifted)))
    if weight is not None:
        wide = op.Mul(wide, op.Cast(weight, to=FLOAT.dtype))
    return op.CastLike(wide, x)


def _onnx_layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    from onnxscript import opset18 as op

    if weight is None:
        # LayerNormalization wants a scale; its length is known at run time at the latest
        size = op.Shape(x, start=-1)
        weight = op.CastLike(op.Expand(op.Constant(value_float=1.0), size), x)
    normalized, _mean, _deviation = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)
    return normalized


def _onnx_add_layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, keep_sum: bool = True
) -> Any:
    from onnxscript import opset18 as op

    total = op.Add(x, residual)
    normalized = _onnx_layer_norm(total, weight, bias, eps)
    return normalized, total if keep_sum else _onnx_empty(x)


def _onnx_add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: float, keep_sum: bool = True
) -> Any:
    from onnxscript import opset18 as op

    total = op.Add(x, residual)
    return _onnx_rms_norm(total, weight, eps), total if keep_sum else _onnx_empty(x)


def _onnx_empty(x: Any) -> Any:
    from onnxscript import opset18 as op

    return op.CastLike(op.ConstantOfShape(op.Constant(value_ints=[0])), x)


def _tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _samples_add_layer_norm() -> Iterator[tuple[Any, ...]]:
    x, residual, weight, bias = _tensors((2, 7, 75), (2, 7, 75), (75,), (75,))
    yield x, residual, weight, bias, 1e-5, True
    yield x, residual, weight, None, 1e-12, False
    yield x, residual, None, None, 1e-5, True
    yield x.transpose(0, 1), residual.transpose(0, 1), weight, bias, 1e-5, True


def _samples_add_rms_norm() -> Iterator[tuple[Any, ...]]:
    x, residual, weight = _tensors((2, 7, 75), (2, 7, 75), (75,))
    yield x, residual, weight, 1e-6, True
    yield x * 1e-4, residual * 1e-4, None, 1e-5, True  # eps decides
    yield x.transpose(0, 1), residual.transpose(0, 1), weight, 1e-5, False


def _samples_rms_norm() -> Iterator[tuple[Tensor, Tensor | None, float]]:
    x, weight = _tensors((2, 7, 75), (75,))
    yield x, weight, 1e-6
    yield x[:, 0], None, 1e-5


add_layer_norm = declare(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, "
    "bool keep_sum=True) -> (Tensor, Tensor)",
    eager=_eager_add_layer_norm,
    meta=lambda x, residual, weight, bias, eps, keep_sum=True: (
        _like(x),
        _like(x) if keep_sum else _empty(x),
    ),
    onnx=_onnx_add_layer_norm,
    kernel="graphwright.ir.kernels.norm:add_layer_norm",
    samples=_samples_add_layer_norm,
)

add_rms_norm = declare(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, bool keep_sum=True)"
    " -> (Tensor, Tensor)",
    eager=_eager_add_rms_norm,
    meta=lambda x, residual, weight, eps, keep_sum=True: (
        _like(x),
        _like(x) if keep_sum else _empty(x),
    ),
    onnx=_onnx_add_rms_norm,
    kernel="graphwright.ir.kernels.norm:add_rms_norm",
    samples=_samples_add_rms_norm,
)

rms_norm = declare(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    eager=_rms_norm,
    meta=lambda x, weight, eps: _like(x),
    onnx=_onnx_rms_norm,
    kernel="graphwright.ir.kernels.norm:rms_norm",
    samples=_samples_rms_norm,
)
