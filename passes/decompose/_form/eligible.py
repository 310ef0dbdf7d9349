"""The layers that can become several smaller ones, and why the others stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from graphwright.ir.adapters.record import adapters
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import CONVOLUTIONS, EXPERTS, PRODUCTS, is_stored_as_matrices
from graphwright.ir.layers.products import geometry, weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.layers.vocabulary_heads import DENSE_HEAD, left_heads
from graphwright.ir.program import Program
from graphwright.passes.base import Action


def eligible(
    program: Program, by: str, targets: Sequence[str], kinds: Collection[str]
) -> tuple[list[list[Layer]], list[Action]]:
    """All uses of every weight that can be decomposed, in graph order; a word on the others.

    Args:
        program: the program.
        by: id of the pass, for the error.
        targets: selector patterns.
        kinds: that the pass has a form for, of `PRODUCTS`.

    Raises:
        ModelError: none can, or a weight holds NaN or infinity.
    """
    chosen = select(program, targets, PRODUCTS)
    nodes = {layer.node for layer in chosen}
    heads = left_heads(program, chosen, targets)
    beside = {name for adapter in adapters(program).values() for name in adapter.layers}
    uses: dict[str, list[Layer]] = {}
    reasons: dict[str, str] = {}
    for layer in chosen:
        reason = _reason(program, layer, nodes, kinds)
        if layer.name in beside:
            reason = "an adapter is beside it: merge that first (adapt.merge)"
        if not reason and layer.node in heads:
            reason = DENSE_HEAD
        if reason:
            reasons[layer.name] = reason
        uses.setdefault(layer.weight or layer.name, []).append(layer)
    good = [every for every in uses.values() if not any(x.name in reasons for x in every)]
    if not good:
        details = tuple(f"{name}: {reason}" for name, reason in reasons.items())[:5]
        raise ModelError(
            f"{by}: no selected layer can be decomposed", details=details, fix="Choose others."
        )
    return good, [Action.left(name, reason) for name, reason in reasons.items()]


def _reason(program: Program, layer: Layer, nodes: set[fx.Node], kinds: Collection[str]) -> str:
    if layer.kind in EXPERTS:
        return "a stack of experts, whose matrices would need ranks of their own"
    if layer.kind not in kinds:
        return f"{layer.kind} has no such form"
    if not layer.weight:
        return "its weight is rebuilt in the graph"
    weight = program.state[layer.weight]
    if not weight.is_floating_point() or not weight.numel():
        return f"its weight is {weight.dtype}" if weight.numel() else "its weight is empty"
    if not is_stored_as_matrices(layer.kind, weight):
        return f"its weight has {weight.dim()} dimensions"
    if layer.kind == "addmm" and (len(layer.node.args) > 3 or layer.node.kwargs):
        return "addmm with factors alpha or beta"
    if layer.kind in CONVOLUTIONS and geometry(program, layer).groups > 1:
        return "a grouped convolution, which is several small ones side by side"
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weight of {layer.name!r} holds NaN or infinity")
    strangers = [user.name for user in weight_node(layer).users if user not in nodes]
    return f"its weight is also read by {strangers[0]}" if strangers else ""
