"""graphwright::linear_2_4: a linear layer on a 2:4 weight.

y = x @ expand_2_4(values, places).T + bias. Made by the fuser from `expand_2_4` feeding
`aten.linear`. On a GPU it runs on PyTorch's semi-structured sparse kernels where these take the
dtype and the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops import expand_2_4 as expanding
from graphwright.ir.ops.registry import declare


def _eager(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, expanding._eager(values, places), bias)


def _meta(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((*x.shape[:-1], values.shape[0]), dtype=x.dtype, device=x.device)


def _macs(x: Tensor, values: Tensor, *_: object) -> Any:
    """As a dense layer's: what a sparse kernel leaves out depends on the device."""
    return x.numel() * values.shape[0]


def _onnx(x: Any, values: Any, places: Any, bias: Any) -> Any:
    from onnxscript import opset18 as op

    weight = op.Transpose(expanding.onnx_expand(values, places), perm=[1, 0])
    y = op.MatMul(x, weight)
    return y if bias is None else op.Add(y, bias)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    weights = list(expanding._samples())
    for tokens, (values, places), has_bias in [
        ((17,), weights[0], True),
        ((2, 3), weights[1], False),
        ((1,), weights[3], True),
    ]:
        x = torch.randn(*tokens, 2 * values.shape[1], generator=generator)
        bias = torch.randn(values.shape[0], generator=generator) if has_bias else None
        yield x, values, places, bias


linear_2_4 = declare(
    "linear_2_4(Tensor x, Tensor values, Tensor places, Tensor? bias) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.expand_2_4:linear_2_4",
    samples=_samples,
    macs=_macs,
)
"""Linear layer whose weight is `expand_2_4(values, places)`."""
