"""Parts shared by passes that train under a mask: the choice of weights, and the baking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from graphwright.ir.context import Context
from graphwright.ir.layers.kinds import (
    PRODUCTS,
    TRANSPOSED_CONVOLUTIONS,
    is_stored_as_matrices,
)
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.layers.vocabulary_heads import DENSE_HEAD, left_heads
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Action
from graphwright.passes.prune._masks.layers import with_weights

KINDS = (*PRODUCTS, *TRANSPOSED_CONVOLUTIONS)
"""Layers whose weight is a matrix or a kernel; tables and norms are never pruned."""

LEFT = "left alone"


def trainable_layers(program: Program, targets: Sequence[str]) -> tuple[list[Layer], list[Action]]:
    """Selected layers whose stored weight can be masked while it trains; reasons of the others.

    Raises:
        ModelError: the selector matches nothing.
    """
    chosen = select(program, targets, KINDS)
    nodes = {layer.node: layer for layer in chosen}
    heads = left_heads(program, chosen, targets)
    trainable = program.trainable()
    layers, actions = [], []
    for layer in chosen:
        reason = ""
        if not layer.weight:
            reason = "its weight is computed in the graph"
        elif layer.weight not in trainable:
            reason = "its weight is frozen"
        elif not trainable[layer.weight].numel():
            reason = "its weight is empty"
        elif not is_stored_as_matrices(layer.kind, trainable[layer.weight]):
            reason = f"its weight has {trainable[layer.weight].dim()} dimensions"
        else:
            reason = _shared(program, layer, nodes)
        if not reason and layer.node in heads:
            reason = DENSE_HEAD
        if reason:
            actions.append(Action.left(layer.name, reason))
        else:
            layers.append(layer)
    return layers, actions


def _shared(program: Program, layer: Layer, chosen: Mapping[fx.Node, Layer]) -> str:
    """The reason why a tied weight cannot be masked: a use that is not selected, or reads it
    otherwise."""
    for node in program.graph.find_nodes(op="get_attr", target=layer.weight):
        for user in node.users:
            other = chosen.get(user)
            if other is None or other.weight != layer.weight or other.kind != layer.kind:
                return f"its weight is also read by {user.name}"
    return ""


def bake(program: Program, by: str, masks: Mapping[str, Tensor]) -> Program:
    """The program with the weights outside their masks set to exact zeros, by weight name."""
    weights = {name: program.state[name].detach() for name in masks}
    return with_weights(
        program, by, {n: w.masked_fill(~masks[n].to(w.device), 0.0) for n, w in weights.items()}
    )


def keyed(context: Context, options: Options) -> Context:
    """The context for a training run that these options decide too, not only `tune`.

    The engine takes up a killed run with the same key only.
    """
    return context.replace(key=f"{context.key} {options.model_dump_json()}")
