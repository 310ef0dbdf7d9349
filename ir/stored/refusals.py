"""Reasons why a layer's weight stays as it is, for passes that put codes in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphwright.ir.layers.kinds import TABLES, is_stored_as_matrices
from graphwright.ir.layers.products import weight_node, weight_value
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.stored.read import is_coded


def refusals(program: Program, chosen: Sequence[Layer], *, embeddings: bool) -> dict[Layer, str]:
    """The reason, for every chosen layer whose weight cannot become codes."""
    nodes = {layer.node for layer in chosen}
    found: dict[Layer, str] = {}
    for layer in chosen:
        if reason := _refusal(program, layer, nodes, embeddings=embeddings):
            found[layer] = reason
    # Layers that share a weight stay or go together.
    kept = {weight_node(layer): layer.name for layer in chosen if layer in found}
    for layer in chosen:
        other = kept.get(weight_node(layer))
        if layer not in found and other is not None:
            found[layer] = f"shares the weight of {other}, which is left alone"
    return found


def _refusal(program: Program, layer: Layer, nodes: set[fx.Node], *, embeddings: bool) -> str:
    weight = weight_node(layer)
    value = weight.meta["val"]
    if layer.kind in TABLES and not embeddings:
        return "embeddings: false"
    if not is_stored_as_matrices(layer.kind, value):
        return f"its weight has {value.dim()} dimensions"
    if not value.is_floating_point():
        return f"its weight is {str(value.dtype).removeprefix('torch.')}"
    if value.numel() == 0:
        return "its weight is empty"
    if layer.kind == "addmm" and (len(layer.node.args) > 3 or layer.node.kwargs):
        return "addmm with factors alpha or beta"
    if is_coded(weight):
        return "its weight is quantized already"
    if strangers := [user.name for user in weight.users if user not in nodes]:
        return f"its weight is also read by {strangers[0]!r}, which is not selected"
    if not bool(torch.isfinite(weight_value(program, layer)).all()):
        return "its weight holds NaN or infinity"
    return ""
