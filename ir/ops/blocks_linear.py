"""graphwright::blocks_linear: a linear layer that keeps its weight as 2 to 8 bit codes.

    y = activation(x @ weight.T + bias + low @ b.T + added)

The weight is what `dequantize_blocks` rebuilds. `low` is x times the first factor of a low-rank
correction of the weight, so that `low @ b.T` is its part of the product; `added` is any tensor of
the size of the result. Made by the fuser from a rebuilt weight feeding `aten.linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops import blocks
from graphwright.ir.ops.activation import activate, onnx_activate
from graphwright.ir.ops.registry import declare


def linear_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    added: Tensor | None,
    activation: str,
) -> Tensor:
    """The layer on a rebuilt weight: what every product of a compressed weight computes."""
    y = F.linear(x, weight.to(x.dtype), bias)
    if low is not None and b is not None:
        y = y + F.linear(low, b)
    return activate(y if added is None else y + added, activation)


def onnx_linear_of(
    x: Any, weight: Any, bias: Any, low: Any, b: Any, added: Any, activation: str
) -> Any:
    """The same on symbolic ONNX values."""
    from onnxscript import opset18 as op

    y = op.MatMul(x, op.Transpose(op.CastLike(weight, x), perm=[1, 0]))
    if bias is not None:
        y = op.Add(y, bias)
    if low is not None:
        y = op.Add(y, op.MatMul(low, op.Transpose(b, perm=[1, 0])))
    return onnx_activate(y if added is None else op.Add(y, added), activation)


def macs_of(x: Tensor, rows: Any, low: Tensor | None) -> Any:
    """Multiply-accumulates of a layer with `rows` outputs."""
    return x.numel() * rows + (0 if low is None else low.numel() * rows)


def random_epilogue(
    generator: torch.Generator, tokens: tuple[int, ...], rows: int, rank: int, has_rest: bool
) -> tuple[Tensor | None, ...]:
    """Sample tensors: bias, low, b, added."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    low, b = (random(*tokens, rank), random(rows, rank)) if rank else (None, None)
    return (
        random(rows) if has_rest else None,
        low,
        b,
        random(*tokens, rows) if has_rest else None,
    )


def _eager(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    low: Tensor | None, b: Tensor | None, added: Tensor | None,
    bits: int, block: int, activation: str,
) -> Tensor:  # fmt: skip
    weight = blocks._eager(codes, scale, zero_point, bits, block, x.shape[-1])
    return linear_of(x, weight, bias, low, b, added, activation)


def _meta(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return torch.empty((*x.shape[:-1], codes.shape[0]), dtype=x.dtype, device=x.device)


def _macs(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Any, bias: Any, low: Any, *_: object
) -> Any:
    return macs_of(x, codes.shape[0], low)


def _onnx(
    x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, low: Any, b: Any, added: Any,
    bits: int, block: int, activation: str,
) -> Any:  # fmt: skip
    weight = blocks._onnx(codes, scale, zero_point, bits, block, int(x.shape[-1]))
    return onnx_linear_of(x, weight, bias, low, b, added, activation)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    stored = list(blocks._samples())
    for index, tokens, rank, has_rest, activation in [
        (0, (1,), 5, True, "gelu"),
        (1, (2, 3), 0, True, "silu"),
        (2, (2,), 3, False, "none"),
        (6, (17,), 0, False, "relu"),
    ]:
        codes, scale, zero_point, bits, block, columns = stored[index]
        x = torch.randn(*tokens, columns, generator=generator)
        rest = random_epilogue(generator, tokens, codes.shape[0], rank, has_rest)
        yield x, codes, scale, zero_point, *rest, bits, block, activation


blocks_linear = declare(
    "blocks_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "Tensor? low, Tensor? b, Tensor? added, int bits, int block, str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.low_bit_linear:blocks_linear",
    samples=_samples,
    macs=_macs,
)
"""Linear layer whose weight is `dequantize_blocks(codes, scale, zero_point, bits, block,
x.shape[-1])`, in the dtype of x. low: (..., rank); b: (out, rank); added: (..., out)."""
