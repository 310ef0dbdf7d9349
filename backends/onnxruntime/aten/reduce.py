"""Reductions, softmax, cumulative sums."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable

aten = torch.ops.aten


def reduced(
    e: Emitter, kind: str, value: ir.Value, dims: Any, keepdim: bool, rank: int
) -> ir.Value:
    """A Reduce* op over the given axes (all when None or empty)."""
    if rank == 0:
        return value
    axes = [dims] if isinstance(dims, int) else list(dims or range(rank))
    axes = sorted(d % rank for d in axes)
    return e.op(kind, value, e.ints(*axes), keepdims=int(keepdim))  # type: ignore[no-any-return]


def _entry(kind: str) -> Any:
    def translate(
        e: Emitter, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> Any:
        dtype = node.meta["val"].dtype
        return reduced(e, kind, e.tensor(a, dtype), dim, keepdim, a.meta["val"].dim())

    return translate


def _all_entry(kind: str) -> Any:
    def translate(e: Emitter, node: fx.Node, a: Any, **_: Any) -> Any:
        dtype = node.meta["val"].dtype
        return reduced(e, kind, e.tensor(a, dtype), None, False, a.meta["val"].dim())

    return translate


translates(aten.sum.dim_IntList)(_entry("ReduceSum"))
translates(aten.mean.dim)(_entry("ReduceMean"))
translates(aten.prod.dim_int)(_entry("ReduceProd"))
translates(aten.amax.default)(_entry("ReduceMax"))
translates(aten.amin.default)(_entry("ReduceMin"))
translates(aten.logsumexp.default)(_entry("ReduceLogSumExp"))
translates(aten.sum.default)(_all_entry("ReduceSum"))
translates(aten.mean.default)(_all_entry("ReduceMean"))
translates(aten.prod.default)(_all_entry("ReduceProd"))
translates(aten.max.default)(_all_entry("ReduceMax"))
translates(aten.min.default)(_all_entry("ReduceMin"))
for _name, _kind in (
    ("sum", "ReduceSum"), ("prod", "ReduceProd"), ("amax", "ReduceMax"), ("amin", "ReduceMin")
):  # fmt: skip
    translates(getattr(torch.ops.prims, _name).default)(_entry(_kind))


@translates(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim)
def any_all(e: Emitter, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False) -> Any:
    kind = "ReduceMax" if "any" in str(node.target) else "ReduceMin"
    bits = e.cast(e.tensor(a, torch.bool), torch.bool, torch.int32)
    value = reduced(e, kind, bits, dim, keepdim, a.meta["val"].dim())
    return e.cast(value, torch.int32, torch.bool)


BY_FLAG = (aten.var.dim, aten.std.dim, aten.var_mean.dim, aten.std_mean.dim)
"""Variances whose third argument says whether one is taken off the count."""


@translates(aten.var_mean.correction, aten.var_mean.dim, aten.std_mean.correction,
            aten.std_mean.dim)  # fmt: skip
def var_mean(
    e: Emitter, node: fx.Node, a: Any, dim: Any = None, unbiased: Any = True,
    keepdim: bool = False, correction: Any = None,
) -> Any:  # fmt: skip
    spread = var(e, node, a, dim, unbiased, keepdim, correction)
    mean = reduced(e, "ReduceMean", e.values[a], dim, keepdim, a.meta["val"].dim())
    return [spread, mean]


@translates(aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
def var(
    e: Emitter, node: fx.Node, a: Any, dim: Any = None, unbiased: Any = True,
    keepdim: bool = False, correction: Any = None,
) -> Any:  # fmt: skip
    fake = a.meta["val"]
    rank = fake.dim()
    if correction is None:
        correction = int(unbiased) if node.target in BY_FLAG else 1
    dims = [d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank))]
    centred = e.op("Sub", e.values[a], reduced(e, "ReduceMean", e.values[a], dims, True, rank))
    square = e.op("Mul", centred, centred)
    value = reduced(e, "ReduceMean", square, dims, keepdim, rank)
    if correction:
        count = e.ints(1)
        for d in dims:
            count = e.op("Mul", count, e.size(fake.shape[d]))
        count = e.cast(e.op("Squeeze", count), torch.int64, fake.dtype)
        fewer = e.op("Sub", count, e.constant(correction, fake.dtype))
        value = e.op("Mul", value, e.op("Div", count, fewer))
    return e.op("Sqrt", value) if "std" in str(node.target) else value


@translates(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(
    e: Emitter, node: fx.Node, a: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False,
    **_: Any,
) -> Any:  # fmt: skip
    kinds = {1: "ReduceL1", 2: "ReduceL2", math.inf: "ReduceMax", -math.inf: "ReduceMin"}
    order = 2 if ord is None else ord
    if order not in kinds:
        raise Untranslatable(node, f"norm of order {ord}")
    value = e.tensor(a, node.meta["val"].dtype)
    if math.isinf(order):
        value = e.op("Abs", value)
    return reduced(e, kinds[order], value, dim, keepdim, a.meta["val"].dim())


@translates(aten.softmax.int, aten._softmax.default, aten.log_softmax.int,
            aten._log_softmax.default)  # fmt: skip
def softmax(e: Emitter, node: fx.Node, a: Any, dim: int, *_: Any, **__: Any) -> Any:
    kind = "LogSoftmax" if "log_softmax" in str(node.target) else "Softmax"
    return e.op(kind, e.tensor(a, node.meta["val"].dtype), axis=dim)


@translates(aten.cumsum.default)
def cumsum(e: Emitter, node: fx.Node, a: Any, dim: int, **_: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("CumSum", e.tensor(a, dtype), e.constant(dim, torch.int64))


@translates(aten.argmax.default, aten.argmin.default)
def argmax(e: Emitter, node: fx.Node, a: Any, dim: Any = None, keepdim: bool = False) -> Any:
    kind = "ArgMax" if node.target is aten.argmax.default else "ArgMin"
    fake, value = a.meta["val"], e.values[a]
    if fake.dtype == torch.bool:
        value = e.cast(value, torch.bool, torch.int32)
    if dim is None:
        flat = e.op("Reshape", value, e.ints(-1))
        return e.op(kind, flat, axis=0, keepdims=0)
    return e.op(kind, value, axis=dim, keepdims=int(keepdim))


@translates(aten.max.dim, aten.min.dim)
def max_dim(e: Emitter, node: fx.Node, a: Any, dim: int, keepdim: bool = False) -> Any:
    kind = "Max" if node.target is aten.max.dim else "Min"
    value = reduced(e, f"Reduce{kind}", e.values[a], dim, keepdim, a.meta["val"].dim())
    return [value, e.op(f"Arg{kind}", e.values[a], axis=dim, keepdims=int(keepdim))]
