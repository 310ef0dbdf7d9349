"""graphwright::int8_linear: a linear layer that keeps its weight as int8, with epilogue.

y = activation(x @ (weight * scale).T + bias), weight int8 (out, in), scale (out,): symmetric, one
scale per output channel. Made by the fuser from a dequantized weight feeding `aten.linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops.activation import activate, onnx_activate
from graphwright.ir.ops.registry import declare


def _eager(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    rebuilt = (weight.to(scale.dtype) * scale[:, None]).to(x.dtype)
    return activate(F.linear(x, rebuilt, bias), activation)


def _meta(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _macs(x: Tensor, weight: Tensor, *_: object) -> Any:
    return x.numel() * weight.shape[0]


def _onnx(x: Any, weight: Any, scale: Any, bias: Any, activation: str) -> Any:
    from onnxscript import opset18 as op

    # DequantizeLinear + MatMul + Add is what ONNX Runtime fuses; it leaves Gemm in float.
    rebuilt = op.CastLike(op.DequantizeLinear(weight, scale, axis=0), x)
    y = op.MatMul(x, op.Transpose(rebuilt, perm=[1, 0]))
    return onnx_activate(y if bias is None else op.Add(y, bias), activation)


def _samples() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, str]]:
    generator = torch.Generator().manual_seed(0)
    for tokens, bias, activation in [(1, True, "none"), (17, True, "gelu"), (17, False, "silu")]:
        yield (
            torch.randn(tokens, 75, generator=generator),
            torch.randint(-127, 128, (37, 75), generator=generator, dtype=torch.int8),
            torch.rand(37, generator=generator) / 127,
            torch.randn(37, generator=generator) if bias else None,
            activation,
        )
    yield (
        torch.randn(75, 17, 2, generator=generator).permute(2, 1, 0),
        torch.randint(-127, 128, (75, 37), generator=generator, dtype=torch.int8).T,
        torch.rand(37, generator=generator) / 127,
        None,
        "none",
    )


int8_linear = declare(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.int8_linear:int8_linear",
    samples=_samples,
    macs=_macs,
)
