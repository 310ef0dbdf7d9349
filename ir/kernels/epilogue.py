"""The epilogue of a product with a compressed weight: bias, low-rank term, sum, activation.

    y = activation(product + bias + low @ b.T + added)

`low` is the input times the first factor of a low-rank term, (tokens, rank), computed beforehand.
A product that is split over the inner dimension leaves float32 sums, which are added in a fixed
order, so that reruns agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels.common import activate, all_floats

REDUCED = 256
"""Channels that a program of the reduction finishes."""


@triton.jit
def finish(
    value, token, channel, m, n, bias, low, b, added, rank,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue on a few tokens (tokens, channels); RANKS of the low-rank term at a time."""
    if HAS_BIAS:
        value += tl.load(bias + channel, mask=channel < n, other=0.0).to(tl.float32)[None, :]
    if RANKS > 0:
        for start in range(0, rank, RANKS):
            index = start + tl.arange(0, RANKS)
            left = tl.load(
                low + token.to(tl.int64)[:, None] * rank + index[None, :],
                mask=(token < m)[:, None] & (index < rank)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                b + channel.to(tl.int64)[:, None] * rank + index[None, :],
                mask=(channel < n)[:, None] & (index < rank)[None, :], other=0.0,
            )  # fmt: skip
            product = left.to(tl.float32)[:, None, :] * right.to(tl.float32)[None, :, :]
            value += tl.sum(product, 2)
    if HAS_ADDED:
        both = (token < m)[:, None] & (channel < n)[None, :]
        place = token.to(tl.int64)[:, None] * n + channel[None, :]
        value += tl.load(added + place, mask=both, other=0.0).to(tl.float32)
    return activate(value, ACTIVATION)


@triton.jit
def finish_tile(
    value, row, channel, m, n, bias, low, b, added, rank,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The epilogue on a tile (tokens, channels); the low-rank term is one more matrix product."""
    if RANKS > 0:
        for start in range(0, rank, RANKS):
            index = start + tl.arange(0, RANKS)
            left = tl.load(
                low + row.to(tl.int64)[:, None] * rank + index[None, :],
                mask=(row < m)[:, None] & (index < rank)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                b + channel.to(tl.int64)[None, :] * rank + index[:, None],
                mask=(index < rank)[:, None] & (channel < n)[None, :], other=0.0,
            )  # fmt: skip
            value = tl.dot(left.to(COMPUTE), right.to(COMPUTE), value, input_precision=PRECISION)
    if HAS_BIAS:
        value += tl.load(bias + channel, mask=channel < n, other=0.0).to(tl.float32)[None, :]
    if HAS_ADDED:
        both = (row < m)[:, None] & (channel < n)[None, :]
        place = row.to(tl.int64)[:, None] * n + channel[None, :]
        value += tl.load(added + place, mask=both, other=0.0).to(tl.float32)
    return activate(value, ACTIVATION)


@triton.jit
def sum_parts_kernel(
    partial, bias, low, b, added, y, m, n, rank,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = epilogue of the sum of partial (SPLIT, m, n)."""
    token = tl.program_id(0) + tl.arange(0, 1)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = (token < m)[:, None] & (channel < n)[None, :]
    place = token.to(tl.int64)[:, None] * n + channel[None, :]
    total = tl.zeros((1, BLOCK), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(
            partial + tl.full((), part, tl.int64) * m * n + place, mask=both, other=0.0
        )
    value = finish(
        total, token, channel, m, n, bias, low, b, added, rank,
        HAS_BIAS, RANKS, HAS_ADDED, ACTIVATION,
    )  # fmt: skip
    tl.store(y + place, value.to(y.dtype.element_ty), mask=both)


@dataclass(frozen=True)
class Epilogue:
    """Operands of the epilogue; the tensors are contiguous, `low` (m, rank), `added` (m, n)."""

    bias: Tensor | None
    low: Tensor | None
    b: Tensor | None
    added: Tensor | None
    activation: str

    @classmethod
    def of(
        cls,
        bias: Tensor | None,
        low: Tensor | None,
        b: Tensor | None,
        added: Tensor | None,
        activation: str,
    ) -> Epilogue:
        """From an op's arguments, of any strides and any number of batch dimensions."""
        if b is None or low is None or b.shape[1] == 0:
            low = b = None
        return cls(
            None if bias is None else bias.contiguous(),
            None if low is None else low.reshape(-1, low.shape[-1]).contiguous(),
            None if b is None else b.contiguous(),
            None if added is None else added.reshape(-1, added.shape[-1]).contiguous(),
            activation,
        )

    @property
    def rank(self) -> int:
        """Of the low-rank term; 0 without one."""
        return 0 if self.b is None else self.b.shape[1]

    def tensors(self, unused: Tensor) -> tuple[Tensor, ...]:
        """bias, low, b, added; `unused` in the place of those there are none of."""
        return tuple(unused if t is None else t for t in (self.bias, self.low, self.b, self.added))

    def constants(self) -> dict[str, Any]:
        """The kernels' constants. A matrix product of ranks needs 16 of them at least."""
        return {
            "HAS_BIAS": self.bias is not None,
            "RANKS": min(64, max(16, triton.next_power_of_2(self.rank))) if self.rank else 0,
            "HAS_ADDED": self.added is not None,
            "ACTIVATION": self.activation,
        }

    def after_dense(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The layer on a rebuilt weight: products by cuBLAS, the rest by one of our kernels."""
        from graphwright.ir.kernels.activation import bias_act

        y = torch.nn.functional.linear(rows, weight, self.bias)
        if self.low is not None and self.b is not None:
            y.addmm_(self.low, self.b.t())
        if self.added is not None:
            y += self.added
        return y if self.activation == "none" else bias_act.launch(y, None, self.activation)

    def sum_parts(self, partial: Tensor, y: Tensor) -> None:
        """Writes y (m, n) from the float32 sums (split, m, n)."""
        split, m, n = partial.shape
        sum_parts_kernel[(m, triton.cdiv(n, REDUCED))](
            partial, *self.tensors(partial), y, m, n, self.rank,
            **self.constants(), SPLIT=split, BLOCK=REDUCED,
        )  # fmt: skip


def fits_epilogue(
    x: Tensor, bias: Tensor | None, low: Tensor | None, b: Tensor | None, added: Tensor | None
) -> bool:
    """Whether the kernels take these tensors, all of one dtype; an empty low-rank term is none."""
    pair = (low, b) if b is not None and b.shape[1] > 0 else ()
    given = [t for t in (x, bias, added, *pair) if t is not None]
    return x.dim() > 0 and all_floats(*given) and all(t.dtype == x.dtype for t in given)
