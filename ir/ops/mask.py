"""graphwright::scale_mask: x * scale + mask, the glue in front of a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare


def _eager(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * scale + mask


def _meta(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _onnx(x: Any, mask: Any, scale: float) -> Any:
    from onnxscript import opset18 as op

    return op.Add(op.Mul(x, op.CastLike(op.Constant(value_float=scale), x)), mask)


def _samples() -> Iterator[tuple[Tensor, Tensor, float]]:
    """Every way a mask of attention scores (batch, heads, queries, keys) is broadcast."""
    generator = torch.Generator().manual_seed(0)
    for mask_shape in [(2, 1, 1, 37), (2, 1, 5, 37), (5, 37), (2, 3, 5, 37), (1, 3, 5, 1)]:
        x = torch.randn(2, 3, 5, 37, generator=generator)
        yield x, torch.randn(mask_shape, generator=generator), 0.125
    yield x.transpose(1, 2), torch.randn(37, generator=generator), -2.0


scale_mask = declare(
    "scale_mask(Tensor x, Tensor mask, float scale) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.activation:scale_mask",
    samples=_samples,
)
