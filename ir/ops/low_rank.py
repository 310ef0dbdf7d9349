"""graphwright::add_low_rank: a weight with a low-rank correction, weight + b @ a.

The correction is part of the weight, so that every pass sees one layer where there is one; a
backend that keeps the weight compressed computes x a^T b^T beside it instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare


def _eager(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return weight + (b @ a).to(weight.dtype)


def _meta(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _onnx(weight: Any, b: Any, a: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Add(weight, op.Cast(op.MatMul(b, a), to=int(weight.dtype)))


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for out, columns, rank in ((37, 75, 5), (16, 300, 1), (130, 17, 33)):
        yield tuple(
            torch.randn(shape, generator=generator)
            for shape in ((out, columns), (out, rank), (rank, columns))
        )


add_low_rank = declare(
    "add_low_rank(Tensor weight, Tensor b, Tensor a) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.low_rank:add_low_rank",
    samples=_samples,
    macs=lambda weight, b, a: b.shape[0] * b.shape[1] * a.shape[1],
)
"""weight (out, columns) + b (out, rank) @ a (rank, columns), in the dtype of the weight."""
