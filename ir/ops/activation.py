"""graphwright::bias_act: add a bias over the last axis, then an activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops.registry import declare

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")
"""`gelu` uses erf, `gelu_tanh` the tanh approximation, `quick_gelu` is x * sigmoid(1.702 x)."""


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of `ACTIVATIONS`; returns `x` itself for `none`.

    Raises:
        ValueError: the activation is not one of `ACTIVATIONS`.
    """
    match activation:
        case "none":
            return x
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"no activation {activation!r}; one of {', '.join(ACTIVATIONS)}")


def onnx_activate(x: Any, activation: str) -> Any:
    """The same on symbolic ONNX values, in opset 18 (Gelu is a standard op only from 20 on)."""
    from onnxscript import opset18 as op

    def constant(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), x)

    match activation:
        case "relu":
            return op.Relu(x)
        case "gelu":
            half = op.Mul(x, constant(0.5))
            return op.Mul(half, op.Add(op.Erf(op.Mul(x, constant(2**-0.5))), constant(1.0)))
        case "gelu_tanh":
            cubic = op.Mul(op.Mul(op.Mul(x, x), x), constant(0.044715))
            inner = op.Mul(op.Add(x, cubic), constant((2 / torch.pi) ** 0.5))
            return op.Mul(op.Mul(x, constant(0.5)), op.Add(op.Tanh(inner), constant(1.0)))
        case "silu":
            return op.Mul(x, op.Sigmoid(x))
        case "quick_gelu":
            return op.Mul(x, op.Sigmoid(op.Mul(x, constant(1.702))))
    return x


def _eager(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = activate(x if bias is None else x + bias, activation)
    return y.clone() if y is x else y


def _meta(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _onnx(x: Any, bias: Any, activation: str) -> Any:
    from onnxscript import opset18 as op

    return onnx_activate(op.Identity(x) if bias is None else op.Add(x, bias), activation)


def _samples() -> Iterator[tuple[Tensor, Tensor | None, str]]:
    generator = torch.Generator().manual_seed(0)
    for activation in ACTIVATIONS:
        x = torch.randn(3, 5, 37, generator=generator) * 3
        yield x, torch.randn(37, generator=generator), activation
    yield torch.randn(75, 17, generator=generator).T, None, "gelu"


bias_act = declare(
    "bias_act(Tensor x, Tensor? bias, str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.activation:bias_act",
    samples=_samples,
)
