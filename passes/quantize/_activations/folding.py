"""Factors on the channels of an activation: taken in by what computes it, or multiplied on.

Layers that read x / s with weights w * s compute what they did with x and w. The division costs
nothing where a norm, a linear layer or a gated product in front of them can take it in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import INPUT_AXIS, MATRICES, TABLE, WEIGHT_ARGUMENT
from graphwright.ir.layers.products import input_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program

aten = torch.ops.aten


NORMS = {
    op: tuple(place for place in (kind.weight, kind.bias) if place is not None)
    for kind in (TABLE["layer_norm"], TABLE["rms_norm"])
    for op in kind.operators
}
"""Norms whose affine parameters can take the factors, and the places of these."""

HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.contiguous.default})
"""f(x / s) = f(x) / s for every s > 0."""

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
ATTENTION = aten.scaled_dot_product_attention.default
RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints,
                      aten.unflatten.int, aten._unsafe_view.default})  # fmt: skip

Change = tuple[str, Callable[[Tensor], Tensor]]
"""Name of a stored tensor, and what becomes of it."""


@dataclass(frozen=True)
class Group:
    """Layers that read one activation."""

    x: fx.Node
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """Names of its layers, joined."""
        return ", ".join(layer.name for layer in self.layers)


def find_groups(
    program: Program, layers: Sequence[Layer], dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> list[Group]:
    """Selected layers by the activation they read; each weight must be its layer's own."""
    found: dict[fx.Node, list[Layer]] = {}
    for layer in layers:
        if layer.kind not in MATRICES or not layer.weight:
            continue
        weight = program.state[layer.weight]
        readers = program.graph.find_nodes(op="get_attr", target=layer.weight)
        if weight.dtype not in dtypes or weight.dim() != 2:
            continue
        if sum(len(node.users) for node in readers) == 1:
            found.setdefault(input_node(layer), []).append(layer)
    return [Group(x, tuple(group)) for x, group in found.items()]


def columns(program: Program, layer: Layer) -> Tensor:
    """The layer's weight as (out, in)."""
    weight = program.state[layer.weight].detach()
    return weight if INPUT_AXIS[layer.kind] == 1 else weight.T


def divide(
    editor: Editor, twin: dict[fx.Node, fx.Node], group: Group, factors: Tensor, *, insert: bool,
    name: str,
) -> str:  # fmt: skip
    """Divides what a group reads by `factors` (in,), and multiplies its weights by them.

    Args:
        editor: of a copy of the program that the group was found in.
        twin: nodes of that program to nodes of the copy.
        group: changed as a whole.
        factors: positive.
        insert: multiply the activation in the graph where nothing before it takes the factors.
        name: of the inserted tensor, behind the first layer's name.

    Returns:
        `folded`, `scaled` (a multiplication was inserted), or nothing: left as it was.
    """
    x = twin[group.x]
    nodes = {twin[layer.node] for layer in group.layers}
    how = "folded"
    changes = _absorb(editor, x, factors) if set(x.users) == nodes else None
    if changes is None:
        if not insert:
            return ""
        how = "scaled"
        stored = editor.add_state(
            f"{group.layers[0].name}.{name}", (1 / factors).to(x.meta["val"].dtype)
        )
        scale = editor.get(stored)
        first = next(n for n in editor.graph.nodes if n in nodes)
        new = editor.call(aten.mul.Tensor, x, scale, before=first, like=first)
        for node in nodes:
            node.replace_input_with(x, new)
    for layer in group.layers:
        wide = factors if INPUT_AXIS[layer.kind] == 1 else factors[:, None]
        weight = twin[layer.node].args[WEIGHT_ARGUMENT[layer.kind]]
        assert isinstance(weight, fx.Node)
        _change(editor, (str(weight.target), _times(wide)))
    for change in changes or ():
        _change(editor, change)
    return how


def _times(multiplier: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value * multiplier


def _change(editor: Editor, change: Change) -> None:
    name, function = change
    old = editor.state[name]
    value = function(old.detach().float()).to(old.dtype)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    editor.set_state(name, value)


def _absorb(editor: Editor, x: fx.Node, factors: Tensor) -> list[Change] | None:
    """The changes that divide x by the factors along its last axis; None where there are none."""
    target = x.target
    if target in NORMS:
        places = [p for p in NORMS[target] if len(x.args) > p and x.args[p] is not None]
        if places[:1] != [2]:
            return None
        return _all(_stored(editor, x.args[p], 1 / factors) for p in places)
    if target is aten.linear.default:
        weight = _stored(editor, x.args[1], 1 / factors[:, None])
        biases = [_stored(editor, b, 1 / factors) for b in x.args[2:] if b is not None]
        return _all([weight, *biases])
    if target is aten.addmm.default and len(x.args) == 3 and not x.kwargs:
        return _all(_stored(editor, x.args[p], 1 / factors) for p in (0, 2))
    if target is aten.matmul.default:
        return _stored(editor, x.args[1], 1 / factors)
    if target in (aten.mul.Tensor, aten.add.Tensor) and len(x.args) == 2 and not x.kwargs:
        return _pointwise(editor, x, factors)
    if target in HOMOGENEOUS:
        return _alone(editor, x.args[0], factors)
    if target is operator.getitem:
        return _part(editor, x, factors)
    if target in RESHAPES:
        return _value_of_attention(editor, x, factors)
    return None


def _all(parts: Any) -> list[Change] | None:
    found: list[Change] = []
    for part in parts:
        if part is None:
            return None
        found += part
    return found


def _alone(editor: Editor, node: object, factors: Tensor) -> list[Change] | None:
    """`_absorb` for a node that nothing else reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    return _absorb(editor, node, factors)


def _stored(editor: Editor, node: object, multiplier: Tensor) -> list[Change] | None:
    """Multiplies a parameter that is stored, read at this one place, and of the right shape."""
    tensor = editor.tensor(node)
    if tensor is None or not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    size = multiplier.numel()
    fits = tensor.shape[0] == size if multiplier.dim() == 2 else tensor.shape[-1:] == (size,)
    return [(str(node.target), _times(multiplier))] if fits else None


def _pointwise(editor: Editor, x: fx.Node, factors: Tensor) -> list[Change] | None:
    """A product takes the factors in one operand, a sum in both."""
    shape = x.meta["val"].shape
    ways = []
    for operand in x.args:
        if not isinstance(operand, fx.Node) or x.args[0] is x.args[1]:
            return None
        if editor.tensor(operand) is not None:
            ways.append(_stored(editor, operand, 1 / factors))
        elif operand.meta["val"].shape == shape:
            ways.append(_alone(editor, operand, factors))
        else:
            ways.append(_shifted(editor, operand, factors))
    if x.target is aten.add.Tensor:
        return _all(ways)
    return next((way for way in ways if way is not None), None)


def _shifted(editor: Editor, node: fx.Node, factors: Tensor) -> list[Change] | None:
    """c + w, as in norms that store their weight less one: (c + w) / s = c + ((c + w) / s - c)."""
    if node.target is not aten.add.Tensor or len(node.users) != 1 or node.kwargs:
        return None
    stored = [a for a in node.args if editor.tensor(a) is not None]
    constants = [float(a) for a in node.args if isinstance(a, (int, float))]
    if len(stored) != 1 or len(constants) != 1:
        return None
    change = _stored(editor, stored[0], 1 / factors)
    if change is None:
        return None
    return [(change[0][0], lambda w: (constants[0] + w) / factors - constants[0])]


def _part(editor: Editor, x: fx.Node, factors: Tensor) -> list[Change] | None:
    """One part of a tensor that was split along its last axis."""
    source, index = x.args
    if not isinstance(source, fx.Node) or source.target not in SPLITS or not isinstance(index, int):
        return None
    dim = full_arguments(source)[0][2]
    parts, whole = source.meta["val"], source.args[0]
    if not isinstance(dim, int) or dim % parts[0].dim() != parts[0].dim() - 1:
        return None
    sizes = [int(part.shape[-1]) for part in parts]
    start = sum(sizes[:index])
    wide = torch.ones(sum(sizes), dtype=factors.dtype)
    wide[start : start + sizes[index]] = factors
    return _alone(editor, whole, wide)


def _value_of_attention(editor: Editor, x: fx.Node, factors: Tensor) -> list[Change] | None:
    """Heads side by side again: the factors go into what the values come from.

    Only where every head has its own values: (batch, length, heads * size) is cut into heads,
    turned, weighted, and put together the same way.
    """
    mixed = _swapped(_alone_input(x))
    if mixed is None or mixed.target is not ATTENTION or len(mixed.users) != 1:
        return None
    arguments, named = full_arguments(mixed)
    value = arguments[2]
    if named["enable_gqa"] or not isinstance(value, fx.Node) or len(value.users) != 1:
        return None
    heads, size = mixed.meta["val"].shape[-3], mixed.meta["val"].shape[-1]
    if value.meta["val"].shape[-3] != heads or not (isinstance(heads, int) and heads > 1):
        return None
    cut = _swapped(value)
    if cut is None or cut.target not in RESHAPES or len(cut.users) != 1:
        return None
    whole = _alone_input(cut)
    if whole is None or tuple(cut.meta["val"].shape[-2:]) != (heads, size):
        return None
    if whole.meta["val"].shape[-1] != len(factors) or heads * size != len(factors):
        return None
    return _absorb(editor, whole, factors)


def _alone_input(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) and len(source.users) == 1 else None


def _swapped(node: fx.Node | None) -> fx.Node | None:
    """The operand that a node turned from (.., a, b, size) to (.., b, a, size); None for any
    other."""
    node = _moved(node)
    if node is None or not isinstance(node.args[0], fx.Node):
        return None
    rank = node.meta["val"].dim()
    if node.target is aten.transpose.int:
        axes = {int(a) % rank for a in node.args[1:3] if isinstance(a, int)}
        is_swap = axes == {rank - 3, rank - 2}
    elif node.target is aten.permute.default:
        order = [int(a) % rank for a in node.args[1]]  # type: ignore[union-attr, arg-type]
        is_swap = order == [*range(rank - 3), rank - 2, rank - 3, rank - 1]
    else:
        return None
    return _moved(node.args[0]) if is_swap else None


def _moved(node: fx.Node | None) -> fx.Node | None:
    """The node behind copies and reshapes to the same shape; None where others read these."""
    while node is not None and (
        node.target is aten.contiguous.default
        or (node.target in RESHAPES and _shape(node) == _shape(node.args[0]))
    ):
        node = _alone_input(node)
    return node


def _shape(node: object) -> tuple[Any, ...]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)
