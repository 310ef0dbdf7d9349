"""The table of layer kinds: their operators, where their operands stand, and the axes of a weight.

Every other module reads these facts from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers the operators of `ours`

aten = torch.ops.aten
ours = torch.ops.graphwright


@dataclass(frozen=True)
class Kind:
    """Facts about one kind of layer.

    Attributes:
        name: as selectors call it, `kind:conv2d`.
        operators: overloads that compute it.
        input, weight, bias: positions in the call; None for a kind without a bias.
        weights: of the kinds in `SEVERAL`, positions that hold a weight or a list of weights.
        out_axis: axis of the weight that the output channels (or the rows of a table) are on.
        in_axis: axis of the weight that is summed over with the input; None where nothing is.
        spatial: dimensions of a convolution's windows.
        experts: position of the indices that give each row its own matrix of a stack.
        is_product: a product of rows and one matrix (`ir/layers/products.py`).
        is_norm: a normalization.
    """

    name: str
    operators: tuple[Any, ...]
    input: int = 0
    weight: int = 1
    bias: int | None = None
    weights: tuple[int, ...] = ()
    out_axis: int = 0
    in_axis: int | None = None
    spatial: int = 0
    experts: int | None = None
    is_product: bool = False
    is_norm: bool = False


def _convolution(rank: int) -> Kind:
    packet = getattr(aten, f"conv{rank}d")
    return Kind(
        f"conv{rank}d", (packet.default, packet.padding), bias=2, in_axis=1, spatial=rank,
        is_product=True,
    )  # fmt: skip


def _transposed(rank: int) -> Kind:
    packet = getattr(aten, f"conv_transpose{rank}d")
    operator = packet.default if rank == 1 else packet.input
    name = f"conv_transpose{rank}d"
    return Kind(name, (operator,), bias=2, out_axis=1, in_axis=0, spatial=rank)


def _routed(name: str, out_axis: int) -> Kind:
    """Products whose rows have a matrix each, of a stack: a mixture of experts."""
    return Kind(name, (getattr(ours, name).default,), bias=3, out_axis=out_axis,
                in_axis=3 - out_axis, experts=2, is_product=True)  # fmt: skip


def _recurrent(name: str) -> Kind:
    return Kind(name, (getattr(aten, name).input,), weight=2, weights=(2,))


def _cell(name: str) -> Kind:
    return Kind(name, (getattr(aten, name).default,), weight=2, weights=(2, 3))


TABLE: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("linear", (aten.linear.default,), bias=2, in_axis=1, is_product=True),
        *(_convolution(rank) for rank in (1, 2, 3)),
        *(_transposed(rank) for rank in (1, 2, 3)),
        Kind("embedding", (aten.embedding.default,), input=1, weight=0),
        Kind("embedding_bag", (aten.embedding_bag.default, aten.embedding_bag.padding_idx), input=1,
             weight=0),
        Kind("bilinear", (aten.bilinear.default,), weight=2, bias=3),
        Kind("einsum", (aten.einsum.default,), input=1, weights=(1,)),
        *(_recurrent(name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        *(_cell(f"{name}_cell") for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        Kind("matmul", (aten.matmul.default,), out_axis=1, in_axis=0, is_product=True),
        Kind("addmm", (aten.addmm.default,), input=1, weight=2, bias=0, out_axis=1, in_axis=0,
             is_product=True),
        _routed("expert_linear", 1),
        _routed("expert_matmul", 2),
        Kind("layer_norm", (aten.layer_norm.default,), weight=2, bias=3, is_norm=True),
        Kind("rms_norm", (aten.rms_norm.default,), weight=2, is_norm=True),
        Kind("batch_norm", (aten.batch_norm.default,), bias=2, is_norm=True),
        Kind("group_norm", (aten.group_norm.default,), weight=2, bias=3, is_norm=True),
    )
}  # fmt: skip
"""Every kind by its name."""

KINDS: dict[object, str] = {op: kind.name for kind in TABLE.values() for op in kind.operators}
"""Name of the kind by operator."""

PRODUCTS = tuple(kind.name for kind in TABLE.values() if kind.is_product)
"""Layers that are products of rows and a matrix."""

EXPERTS = tuple(name for name in PRODUCTS if TABLE[name].experts is not None)
"""Products whose weight is a stack of matrices, one for each expert."""

MATRICES = tuple(name for name in PRODUCTS if not TABLE[name].spatial and name not in EXPERTS)
"""Products whose weight is a matrix."""

CONVOLUTIONS = tuple(name for name in PRODUCTS if TABLE[name].spatial)
TRANSPOSED_CONVOLUTIONS = tuple(
    kind.name for kind in TABLE.values() if kind.spatial and not kind.is_product
)
"""Layers with a weight that are no product of rows and a matrix."""

SEVERAL = tuple(kind.name for kind in TABLE.values() if kind.weights)
"""Calls that read several weights: each is a layer, called after its tensor."""

TABLES = ("embedding", "embedding_bag")
"""Layers that pick rows of their weight, and multiply nothing."""

TURNED = tuple(name for name in MATRICES if TABLE[name].out_axis == 1)
"""Matrices that are stored (in, out)."""

TURNED_EXPERTS = tuple(name for name in EXPERTS if TABLE[name].out_axis == 2)
"""Stacks of matrices that are stored (experts, in, out)."""

STORED = (*TRANSPOSED_CONVOLUTIONS, *TABLES, "bilinear", *SEVERAL)
"""Layers whose weight can be codes, and that no method calibrates: rounded to nearest."""

CODABLE = (*PRODUCTS, *STORED)
"""Layers whose weight a pass replaces by codes, or reports with the reason why not."""

NORMS = tuple(kind.name for kind in TABLE.values() if kind.is_norm)

WEIGHT_ARGUMENT = {kind.name: kind.weight for kind in TABLE.values()}
INPUT_ARGUMENT = {kind.name: kind.input for kind in TABLE.values()}
BIAS_ARGUMENT = {
    kind.name: kind.bias for kind in TABLE.values() if kind.is_product and kind.bias is not None
}
"""Position of a product's bias; a matmul has none."""

OUTPUT_AXIS = {kind.name: kind.out_axis for kind in TABLE.values()}
INPUT_AXIS = {kind.name: kind.in_axis for kind in TABLE.values() if kind.in_axis is not None}


def weight_places(node: fx.Node, kind: str) -> list[tuple[int, ...]]:
    """Places of a call's weights among its arguments, each an index, or one into a list too.

    Biases of recurrent layers and vectors in an einsum are none.
    """
    found: list[tuple[int, ...]] = []
    for place in TABLE[kind].weights or (TABLE[kind].weight,):
        given = node.args[place] if len(node.args) > place else None
        many = isinstance(given, list | tuple)
        found += [(place, at) for at in range(len(given))] if many else [(place,)]  # type: ignore[arg-type]
    return found


def at_place(node: fx.Node, place: tuple[int, ...]) -> object:
    """The argument at one of a call's `weight_places`."""
    value: object = node.args[place[0]] if len(node.args) > place[0] else None
    return value[place[1]] if len(place) > 1 else value  # type: ignore[index]


def put_at(args: list[Any], place: tuple[int, ...], value: object) -> None:
    """Puts a weight in its place among a call's arguments."""
    if len(place) == 1:
        args[place[0]] = value
        return
    many = list(args[place[0]])
    many[place[1]] = value
    args[place[0]] = many


def matrix_product(node: fx.Node) -> Kind | None:
    """The kind of a call that multiplies rows with a matrix; None for any other node."""
    name = KINDS.get(node.target, "")
    return TABLE[name] if name in MATRICES else None


def operators(names: tuple[str, ...]) -> frozenset[Any]:
    """The operators of several kinds."""
    return frozenset(op for name in names for op in TABLE[name].operators)


def is_stored_as_matrices(kind: str, weight: Tensor) -> bool:
    """Whether a weight has the dimensions that a layer of its kind is written for: a matmul may
    also have a stack of matrices, which is no layer here."""
    return weight.dim() == 2 if kind in MATRICES else weight.dim() >= 2
