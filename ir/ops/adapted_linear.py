"""graphwright::adapted_linear: a linear layer and the low-rank adapter beside it in one call.

    y = activation(x @ weight.T + bias + low @ b.T + added)

`low` is x brought to the adapter's rank, its scale included, so that `low @ b.T` is what the
adapter adds. Made by the fuser where an adapter has not been merged; layers whose weight is
compressed take the same two factors into `blocks_linear`, `table_linear` and `codebook_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.blocks_linear import linear_of, macs_of, onnx_linear_of, random_epilogue
from graphwright.ir.ops.registry import declare


def _eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, added: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    return linear_of(x, weight, bias, low, b, added, activation)


def _meta(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def _macs(x: Tensor, weight: Tensor, bias: Any, low: Tensor, *_: object) -> Any:
    return macs_of(x, weight.shape[0], low)


def _onnx(x: Any, weight: Any, bias: Any, low: Any, b: Any, added: Any, activation: str) -> Any:
    return onnx_linear_of(x, weight, bias, low, b, added, activation)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, tokens, rank, has_rest, activation in [
        (37, 75, (1,), 5, True, "gelu"),
        (21, 130, (2, 3), 16, False, "none"),
        (70, 33, (17,), 70, True, "silu"),
    ]:
        x, weight = (torch.randn(*s, generator=generator) for s in ((*tokens, columns),
                                                                    (rows, columns)))  # fmt: skip
        bias, low, b, added = random_epilogue(generator, tokens, rows, rank, has_rest)
        yield x, weight, bias, low, b, added, activation


adapted_linear = declare(
    "adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor low, Tensor b, Tensor? added, "
    "str activation) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.adapted_linear:adapted_linear",
    samples=_samples,
    macs=_macs,
)
"""x: (..., in); weight: (out, in); bias: (out,); low: (..., rank); b: (out, rank); added and the
result: (..., out)."""
