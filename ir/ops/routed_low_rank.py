"""graphwright::routed_low_rank: every sample of a batch with its own low-rank adapter.

    y[i] = x[i] @ a[which[i]].T @ b[which[i]].T + added[i];   y[i] = added[i] where which[i] = -1

The adapters of a layer are one stack of factors, brought to one rank with zeros. So a batch of
requests for different adapters is one call, and reads the base's weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare


def _eager(x: Tensor, a: Tensor, b: Tensor, which: Tensor, added: Tensor) -> Tensor:
    place = torch.where(which == -1, 0, which)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    low = torch.bmm(rows, a.index_select(0, place).mT)
    low = torch.where((which == -1)[:, None, None], 0, low)
    return added + torch.bmm(low, b.index_select(0, place).mT).reshape(added.shape)


def _meta(x: Tensor, a: Tensor, b: Tensor, which: Tensor, added: Tensor) -> Tensor:
    return torch.empty(added.shape, dtype=added.dtype, device=added.device)


def _macs(x: Tensor, a: Tensor, b: Tensor, which: Tensor, added: Tensor) -> Any:
    return a.shape[1] * (x.numel() + added.numel())


def _onnx(x: Any, a: Any, b: Any, which: Any, added: Any) -> Any:
    from onnxscript import opset18 as op

    none = op.Equal(which, op.Constant(value_int=-1))
    place = op.Where(none, op.Constant(value_int=0), which)
    rows = op.Reshape(x, op.Constant(value_ints=[0, -1, int(x.shape[-1])]))
    low = op.MatMul(rows, op.Transpose(op.Gather(a, place, axis=0), perm=[0, 2, 1]))
    is_none = op.Reshape(none, op.Constant(value_ints=[-1, 1, 1]))
    low = op.Where(is_none, op.CastLike(op.Constant(value_float=0.0), low), low)
    y = op.MatMul(low, op.Transpose(op.Gather(b, place, axis=0), perm=[0, 2, 1]))
    return op.Add(added, op.Reshape(y, op.Shape(added)))


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out, rank, which in [
        ((4, 75), 37, 5, [2, -1, 0, 2]),
        ((3, 19, 130), 70, 16, [1, 0, 1]),
        ((2, 2, 3, 33), 21, 40, [-1, -1]),
    ]:

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x, added = random(*shape), random(*shape[:-1], out)
        yield x, random(3, rank, shape[-1]), random(3, out, rank), torch.tensor(which), added


routed_low_rank = declare(
    "routed_low_rank(Tensor x, Tensor a, Tensor b, Tensor which, Tensor added) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.routed_low_rank:routed_low_rank",
    samples=_samples,
    macs=_macs,
)
"""x: (batch, ..., in); a: (adapters, rank, in); b: (adapters, out, rank); which: (batch,) int64,
the adapter of every sample or -1 for none; added and the result: (batch, ..., out). A number that
names no adapter raises an IndexError; the kernel, which cannot, fills that sample with NaN."""
