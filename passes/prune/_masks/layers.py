"""Chooses the layers that can be masked, and puts new weights into a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import PRODUCTS, is_stored_as_matrices
from graphwright.ir.layers.products import as_matrix, geometry
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.layers.vocabulary_heads import DENSE_HEAD, left_heads
from graphwright.ir.program import Program
from graphwright.passes.base import Action
from graphwright.passes.prune._masks.patterns import Pattern


def maskable(
    program: Program, targets: Sequence[str], pattern: Pattern
) -> tuple[list[Layer], list[Action]]:
    """Selected layers that can have the pattern, and why the others are left alone.

    Raises:
        ModelError: none can, or a weight holds NaN or infinity.
    """
    chosen = select(program, targets, PRODUCTS)
    nodes = {layer.node for layer in chosen}
    heads = left_heads(program, chosen, targets)
    good, actions = [], []
    for layer in chosen:
        reason = _reason(program, layer, nodes, pattern)
        if not reason and layer.node in heads:
            reason = DENSE_HEAD
        if reason:
            actions.append(Action.left(layer.name, reason))
        else:
            good.append(layer)
    if not good:
        first = actions[0]
        raise ModelError(f"no selected layer can be pruned: {first.layer}: {first.reason}",
                         fix="Choose other `targets`, or another pattern.")  # fmt: skip
    return good, actions


def _reason(program: Program, layer: Layer, chosen: set[fx.Node], pattern: Pattern) -> str:
    if not layer.weight:
        return "its weight is rebuilt in the graph, and holds no values to mask"
    weight = program.state[layer.weight]
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"its weight is {weight.dtype}" if weight.numel() else "its weight is empty"
    if not is_stored_as_matrices(layer.kind, weight):
        return f"its weight has {weight.dim()} dimensions"
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weight of {layer.name!r} holds NaN or infinity")
    for reader in program.graph.find_nodes(op="get_attr", target=layer.weight):
        others = [user for user in reader.users if user not in chosen]
        if others:
            return f"its weight is also read by {others[0].name}"
    return pattern.misfit(geometry(program, layer).depth)


def matrix(program: Program, layer: Layer) -> Tensor:
    """The stored weight of a layer as (groups, rows, columns) float32; a new tensor."""
    weight = program.state[layer.weight].detach()
    return as_matrix(geometry(program, layer), weight).float().clone()


def with_weights(program: Program, by: str, weights: Mapping[str, Tensor]) -> Program:
    """The program with other values in stored weights, by state name; dtypes stay."""
    editor = Editor(program, by=by)
    for name, value in weights.items():
        old = editor.state[name]
        new = value.detach().to(device=old.device, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        editor.set_state(name, new)
    return editor.finish()


def share_of_zeros(program: Program, names: Sequence[str]) -> float:
    """Zeros among all values of the named weights."""
    weights = [program.state[name] for name in dict.fromkeys(names)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return zeros / max(1, sum(w.numel() for w in weights))
