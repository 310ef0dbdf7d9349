"""What stands in front of an activation and can take in factors on its channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.heads import FUSED
from graphwright.ir.layers.kinds import EXPERTS, TABLE, operators

aten = torch.ops.aten
ours = torch.ops.graphwright

STACKS = operators(EXPERTS)

NORMS = {
    op: tuple(place for place in (kind.weight, kind.bias) if place is not None)
    for kind in (TABLE["layer_norm"], TABLE["rms_norm"])
    for op in kind.operators
}
"""Norms whose affine parameters can take the factors, and the places of these."""

HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.contiguous.default})
"""f(x / s) = f(x) / s for every s > 0."""

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints,
                      aten.unflatten.int, aten._unsafe_view.default})  # fmt: skip

Change = tuple[str, Callable[[Tensor], Tensor]]
"""Name of a stored tensor, and what becomes of it."""


def times(multiplier: Tensor) -> Callable[[Tensor], Tensor]:
    """The change that multiplies a tensor."""
    return lambda value: value * multiplier


def absorb(editor: Editor, x: fx.Node, factors: Tensor) -> list[Change] | None:
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


def absorb_stack(
    editor: Editor, x: fx.Node, factors: Tensor, routing: fx.Node
) -> list[Change] | None:
    """`absorb` for rows that have the factors of their expert each, (experts, in)."""
    if x.target in STACKS:
        if x.args[2] is not routing:
            return None
        is_turned = x.target is ours.expert_matmul.default
        rows = 1 / (factors.unsqueeze(-2) if is_turned else factors.unsqueeze(-1))
        biases = [_entries(editor, b, 1 / factors) for b in x.args[3:] if b is not None]
        return _all([_entries(editor, x.args[1], rows), *biases])
    operands: list[Any] = []
    if x.target is aten.mul.Tensor and x.args[0] is not x.args[1] and not x.kwargs:
        operands = list(x.args)
    elif x.target in HOMOGENEOUS:
        operands = [x.args[0]]
    elif x.target is operator.getitem:
        whole = _whole(x, factors)
        if whole is None:
            return None
        operands, factors = [whole[0]], whole[1]
    for node in operands:
        if isinstance(node, fx.Node) and len(node.users) == 1:
            found = absorb_stack(editor, node, factors, routing)
            if found is not None:
                return found
    return None


def _entries(editor: Editor, node: object, multiplier: Tensor) -> list[Change] | None:
    """Multiplies a stored stack that is read at this one place."""
    if editor.tensor(node) is None or not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    return [(str(node.target), times(multiplier))]


def _all(parts: Any) -> list[Change] | None:
    found: list[Change] = []
    for part in parts:
        if part is None:
            return None
        found += part
    return found


def _alone(editor: Editor, node: object, factors: Tensor) -> list[Change] | None:
    """`absorb` for a node that nothing else reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    return absorb(editor, node, factors)


def _stored(editor: Editor, node: object, multiplier: Tensor) -> list[Change] | None:
    """Multiplies a parameter that is stored, read at this one place, and of the right shape."""
    tensor = editor.tensor(node)
    if tensor is None or not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    size = multiplier.numel()
    fits = tensor.shape[0] == size if multiplier.dim() == 2 else tensor.shape[-1:] == (size,)
    return [(str(node.target), times(multiplier))] if fits else None


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
    whole = _whole(x, factors)
    return None if whole is None else _alone(editor, *whole)


def _whole(x: fx.Node, factors: Tensor) -> tuple[object, Tensor] | None:
    """The tensor that x is a part of, split along its last axis, and the factors of all of it."""
    source, index = x.args
    if not isinstance(source, fx.Node) or source.target not in SPLITS or not isinstance(index, int):
        return None
    dim = full_arguments(source)[0][2]
    parts, whole = source.meta["val"], source.args[0]
    if not isinstance(dim, int) or dim % parts[0].dim() != parts[0].dim() - 1:
        return None
    sizes = [int(part.shape[-1]) for part in parts]
    start = sum(sizes[:index])
    wide = torch.ones(*factors.shape[:-1], sum(sizes), dtype=factors.dtype)
    wide[..., start : start + sizes[index]] = factors
    return whole, wide


def _value_of_attention(editor: Editor, x: fx.Node, factors: Tensor) -> list[Change] | None:
    """Heads side by side again: the factors go into what the values come from.

    Only where every head has its own values: (batch, length, heads * size) is cut into heads,
    turned, weighted, and put together the same way.
    """
    mixed = _swapped(_alone_input(x))
    if mixed is None or mixed.target not in FUSED or len(mixed.users) != 1:
        return None
    arguments, named = full_arguments(mixed)
    value = arguments[2]
    if named.get("enable_gqa") or not isinstance(value, fx.Node) or len(value.users) != 1:
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
    return absorb(editor, whole, factors)


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
