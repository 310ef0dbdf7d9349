"""Calls that put the same elements elsewhere or under another dtype, and compute nothing."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

RESHAPES = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims,
    aten.unsqueeze.default,
)  # fmt: skip
TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.t.default)
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
         aten.type_as.default)  # fmt: skip
COPIES = (aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default)
EXPANDS = (aten.expand.default, aten.expand_as.default)


def order_of(node: fx.Node) -> list[int]:
    """The axis order that a transpose-like call applies."""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    a, b = (0, 1) if node.target is aten.t.default else node.args[1:3]
    if rank > 1:
        order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return order
