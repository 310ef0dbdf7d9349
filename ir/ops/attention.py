"""graphwright::attention: what scaled_dot_product_attention cannot say.

    s = scale q k^T,    s = softcap tanh(s / softcap) where softcap > 0,
    y = softmax([s + mask, sinks])[..., :-1] v

A cap bounds the scores; a sink is one learned score per head that takes part in the sum of the
softmax and stands for no value. Keys and values are not repeated over the heads that share them.
Traces hold this op only where one of the two is there, so that all other attention stays ATen's.

Sources: Gemma Team 2024, "Gemma 2", section 2 (logit soft-capping); OpenAI 2025, "gpt-oss-120b &
gpt-oss-20b Model Card", section 2.2 (a learned bias in the denominator of the softmax).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare

CLOSED = -1e38
"""Score of a key that a boolean mask hides: a query that sees no key at all gets the mean of the
values, as from the written-out attention of transformers."""


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, length, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    rows = q.reshape(batch, groups, heads // groups * length, width)
    scores = torch.matmul(rows, k.transpose(2, 3)).reshape(batch, heads, length, keys) * scale
    if q.dtype != torch.float64:
        scores = scores.float()
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        is_truth = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, CLOSED) if is_truth else scores + mask
    column = None if sinks is None else sinks.to(scores.dtype).view(1, heads, 1, 1)
    top = scores.detach().amax(-1, keepdim=True)
    if column is not None:
        top = torch.maximum(top, column.detach())
    shares = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
    total = shares.sum(-1, keepdim=True)
    if column is not None:
        total = total + torch.exp(column - top)
    shares = shares / torch.where(total == 0, 1.0, total)
    shares = shares.to(v.dtype).reshape(batch, groups, heads // groups * length, keys)
    return torch.matmul(shares, v).reshape(batch, heads, length, v.shape[3])


def _meta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)


def _onnx(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any) -> Any:
    from onnxscript import opset18 as op

    minus_one, zero = op.Constant(value_ints=[-1]), op.CastLike(op.Constant(value_float=0.0), q)
    grouped = op.Concat(op.Shape(k, start=0, end=2), minus_one, op.Shape(q, start=3, end=4), axis=0)
    whole = op.Concat(op.Shape(q, start=0, end=3), op.Shape(k, start=2, end=3), axis=0)
    query = op.Mul(q, op.CastLike(op.Constant(value_float=float(scale)), q))
    scores = op.MatMul(op.Reshape(query, grouped), op.Transpose(k, perm=[0, 1, 3, 2]))
    scores = op.Reshape(scores, whole)
    if softcap > 0:
        cap = op.CastLike(op.Constant(value_float=float(softcap)), q)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if mask is not None:
        if str(mask.dtype) in ("BOOL", "DataType.BOOL"):
            closed = op.CastLike(op.Constant(value_float=CLOSED), q)
            mask = op.Where(mask, zero, closed)
        scores = op.Add(scores, op.CastLike(mask, q))
    if sinks is None:
        shares = op.Softmax(scores, axis=-1)
        shares = op.Where(op.IsNaN(shares), zero, shares)
    else:
        one = op.Constant(value_ints=[1])
        column = op.Reshape(op.CastLike(sinks, q), op.Constant(value_ints=[1, -1, 1, 1]))
        column = op.Expand(column, op.Concat(op.Shape(q, start=0, end=3), one, axis=0))
        shares = op.Softmax(op.Concat(scores, column, axis=-1), axis=-1)
        shares = op.Slice(shares, op.Constant(value_ints=[0]), minus_one, minus_one)
    rows = op.Concat(op.Shape(k, start=0, end=2), minus_one, op.Shape(k, start=2, end=3), axis=0)
    y = op.MatMul(op.Reshape(shares, rows), v)
    shape = op.Concat(op.Shape(q, start=0, end=3), op.Shape(v, start=3, end=4), axis=0)
    return op.Reshape(y, shape)


def _macs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Any:
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return scores * (q.shape[3] + v.shape[3])


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for batch, heads, groups, length, keys, width, wide, cap, has_sinks, mask in [
        (2, 4, 2, 5, 9, 16, 16, 5.0, False, "causal"),
        (1, 3, 3, 1, 1, 8, 24, 0.0, True, None),
        (3, 6, 2, 70, 131, 40, 40, 30.0, True, "bias"),
        (2, 2, 1, 3, 7, 16, 16, 2.0, False, "closed"),
    ]:
        q, k = random(batch, heads, length, width) * 3, random(batch, groups, keys, width)
        v = random(batch, groups, keys, wide)
        given: Tensor | None = None
        if mask == "bias":
            given = random(batch, 1, length, keys)
        elif mask is not None:
            past = keys - length
            given = torch.ones(length, keys, dtype=torch.bool).tril(past).expand(
                batch, 1, length, keys
            ).clone()  # fmt: skip
            given[0, :, :, :past] = mask != "closed"
            if mask == "closed":
                given[0, :, 0] = False
        sinks = random(heads) if has_sinks else None
        yield q, k, v, given, width**-0.5, cap, sinks


attention = declare(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, "
    "Tensor? sinks) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.attention:attention",
    samples=_samples,
    macs=_macs,
)
"""q (B, H, S, D), k (B, K, T, D), v (B, K, T, W), H a multiple of K: y (B, H, S, W).

mask: boolean (True is seen) or added to the capped scores, of a shape that stretches to
(B, H, S, T). softcap: 0 is none. sinks: (H,). Scores, softmax and sums are in float32 at least."""
