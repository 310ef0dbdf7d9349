"""Values chosen by a bound or a condition: clamp, where, masked_fill."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter

aten = torch.ops.aten


@translates(aten.clamp.default, aten.clamp.Tensor)
def clamp(e: Emitter, node: fx.Node, a: Any, min: Any = None, max: Any = None) -> Any:
    dtype = node.meta["val"].dtype
    value = e.tensor(a, dtype)
    if node.target is aten.clamp.Tensor:
        value = value if min is None else e.op("Max", value, e.tensor(min, dtype))
        return value if max is None else e.op("Min", value, e.tensor(max, dtype))
    low = None if min is None else e.tensor(min, dtype)
    high = None if max is None else e.tensor(max, dtype)
    return e.op("Clip", value, low, high)


@translates(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(e: Emitter, node: fx.Node, a: Any, min: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Max", e.tensor(a, dtype), e.tensor(min, dtype))


@translates(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(e: Emitter, node: fx.Node, a: Any, max: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Min", e.tensor(a, dtype), e.tensor(max, dtype))


@translates(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(e: Emitter, node: fx.Node, condition: Any, a: Any, b: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Where", e.tensor(condition, torch.bool), e.tensor(a, dtype), e.tensor(b, dtype))


@translates(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(e: Emitter, node: fx.Node, a: Any, mask: Any, value: Any) -> Any:
    dtype = node.meta["val"].dtype
    return e.op("Where", e.tensor(mask, torch.bool), e.tensor(value, dtype), e.tensor(a, dtype))
