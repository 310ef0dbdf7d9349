"""Factors on the channels of an activation: taken in by what computes it, or multiplied on.

Layers that read x / s with weights w * s compute what they did with x and w. The division costs
nothing where a norm, a linear layer or a gated product in front of them can take it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphwright.ir.calibration.experts import is_stack, routing_node
from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import (
    EXPERTS,
    MATRICES,
    TURNED,
    TURNED_EXPERTS,
    WEIGHT_ARGUMENT,
)
from graphwright.ir.layers.products import input_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import matrix_of
from graphwright.passes.quantize._activations.absorb import Change, absorb, absorb_stack, times

aten = torch.ops.aten
ours = torch.ops.graphwright


@dataclass(frozen=True)
class Group:
    """Layers that read one activation; stacks of experts, by one routing."""

    x: fx.Node
    layers: tuple[Layer, ...]
    routing: fx.Node | None = None

    @property
    def name(self) -> str:
        """Names of its layers, joined."""
        return ", ".join(layer.name for layer in self.layers)


def find_groups(
    program: Program, layers: Sequence[Layer], dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> list[Group]:
    """Selected layers by the activation they read; each weight must be its layer's own."""
    found: dict[tuple[fx.Node, fx.Node | None], list[Layer]] = {}
    for layer in layers:
        if layer.kind not in (*MATRICES, *EXPERTS) or not layer.weight:
            continue
        weight = program.state[layer.weight]
        readers = program.graph.find_nodes(op="get_attr", target=layer.weight)
        if weight.dtype not in dtypes or weight.dim() != (3 if is_stack(layer) else 2):
            continue
        if sum(len(node.users) for node in readers) == 1:
            routing = routing_node(layer) if is_stack(layer) else None
            found.setdefault((input_node(layer), routing), []).append(layer)
    return [Group(x, tuple(group), routing) for (x, routing), group in found.items()]


def columns(program: Program, layer: Layer) -> Tensor:
    """The layer's weight as (out, in); the matrices of a stack one below the other."""
    return matrix_of(layer.kind, program.state[layer.weight].detach())


def divide(
    editor: Editor, twin: dict[fx.Node, fx.Node], group: Group, factors: Tensor, *, insert: bool,
    name: str,
) -> str:  # fmt: skip
    """Divides what a group reads by `factors` (in,), and multiplies its weights by them.

    Args:
        editor: of a copy of the program that the group was found in.
        twin: nodes of that program to nodes of the copy.
        group: changed as a whole.
        factors: positive; of a group of stacks (experts, in).
        insert: multiply the activation in the graph where nothing before it takes the factors.
        name: of the inserted tensor, behind the first layer's name.

    Returns:
        `folded`, `scaled` (a multiplication was inserted), or nothing: left as it was.
    """
    x = twin[group.x]
    nodes = {twin[layer.node] for layer in group.layers}
    how = "folded"
    routing = twin[group.routing] if group.routing else None
    changes = None
    if set(x.users) == nodes:
        changes = (absorb(editor, x, factors) if routing is None
                   else absorb_stack(editor, x, factors, routing))  # fmt: skip
    if changes is None:
        if not insert:
            return ""
        how = "scaled"
        stored = editor.add_state(
            f"{group.layers[0].name}{'.' if routing is None else '_'}{name}",
            (1 / factors).to(x.meta["val"].dtype),
        )
        scale = editor.get(stored)
        first = next(n for n in editor.graph.nodes if n in nodes)
        if routing is not None:
            scale = editor.call(aten.index.Tensor, scale, [routing], before=first, like=first)
        new = editor.call(aten.mul.Tensor, x, scale, before=first, like=first)
        for node in nodes:
            node.replace_input_with(x, new)
    for layer in group.layers:
        is_turned = layer.kind in (*TURNED, *TURNED_EXPERTS)
        wide = factors.unsqueeze(-1) if is_turned else factors.unsqueeze(-2)
        weight = twin[layer.node].args[WEIGHT_ARGUMENT[layer.kind]]
        assert isinstance(weight, fx.Node)
        _change(editor, (str(weight.target), times(wide)))
    for change in changes or ():
        _change(editor, change)
    return how


def _change(editor: Editor, change: Change) -> None:
    name, function = change
    old = editor.state[name]
    value = function(old.detach().float()).to(old.dtype)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    editor.set_state(name, value)
