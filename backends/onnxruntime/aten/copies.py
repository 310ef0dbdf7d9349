"""Casts, and calls that only matter for memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


@translates(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
    aten.float.default if hasattr(aten, "float") else aten.to.dtype,
)
def to(e: Emitter, node: fx.Node, a: Any, *_: Any, **__: Any) -> Any:
    return e.tensor(a, node.meta["val"].dtype)


@translates(
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
)
def same(e: Emitter, node: fx.Node, a: Any, *_: Any, **__: Any) -> Any:
    return e.values[a]


@translates(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(e: Emitter, node: fx.Node, a: Any, p: float, train: bool) -> Any:
    if train:
        raise Untranslatable(node, "dropout in training mode")
    return e.values[a]


@translates(aten.copy.default)
def copy(e: Emitter, node: fx.Node, a: Any, b: Any, *_: Any) -> Any:
    want = sizes_of(node)
    value = e.tensor(b, node.meta["val"].dtype)
    return value if sizes_of(b) == want else e.op("Expand", value, e.shape(want))
