"""Low-rank branches beside layers: y + s b(a(x)) in the form that each kind of layer has."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from typing_extensions import TypeVar

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.slices import SLOTS, spread
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import CONVOLUTIONS, INPUT_ARGUMENT, TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass, weight_shape

aten = torch.ops.aten

Number = TypeVar("Number", int, float)

Rank = Annotated[int, Field(ge=1)]


class RankOptions(AdapterOptions):
    """Options of adapters with a rank."""

    rank: Rank = 8
    """Rank of every layer's change."""

    ranks: dict[str, Rank] = Field(default={})
    """Ranks of single layers, by a glob over their names; the first that matches counts."""


class ScaledOptions(RankOptions):
    """Options of adapters whose change is scaled by `alpha` over the rank."""

    alpha: Annotated[float, Field(gt=0)] = 8.0
    """The change is multiplied by alpha / rank."""

    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """`alpha` of single layers, by a glob over their names; the first that matches counts."""

    scaling: Literal["standard", "rank_stabilized"] = "standard"
    """`rank_stabilized` multiplies by alpha / sqrt(rank) instead (rsLoRA)."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropout on what the adapter reads, while it is trained."""


RankT = TypeVar("RankT", bound=RankOptions, default=RankOptions)


class RankPass(AdapterPass[RankT]):
    """An adapter with a rank; by default its change is s b a."""

    def refusal(self, layer: Layer) -> str:
        rank_of(self.options, layer)
        return ""

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        return with_change(layer)


def rank_of(options: RankOptions, layer: Layer) -> int:
    """The rank that the options give a layer.

    Raises:
        ModelError: it is larger than the layer's matrix allows, or its groups do not divide it.
    """
    rank = _of(options.ranks, layer, options.rank)
    out, columns = matrix_shape(layer)
    if rank > min(out, columns):
        raise ModelError(
            f"rank {rank} is larger than layer {layer.name!r} allows, a matrix of {out} by "
            f"{columns}",
            fix=f"Set `ranks: {{{layer.name}: {min(out, columns)}}}`, or leave the layer out.",
        )
    groups = groups_of(layer)
    if rank % groups:
        raise ModelError(
            f"rank {rank} of layer {layer.name!r} is no multiple of its {groups} groups",
            fix=f"Set `ranks: {{{layer.name}: {groups}}}`, or leave the layer out.",
        )
    return rank


def scale_of(options: ScaledOptions, layer: Layer) -> float:
    """The factor of a layer's change."""
    rank, alpha = rank_of(options, layer), _of(options.alphas, layer, options.alpha)
    return alpha / (math.sqrt(rank) if options.scaling == "rank_stabilized" else rank)


def _of(table: dict[str, Number], layer: Layer, default: Number) -> Number:
    return next((v for p, v in table.items() if any(fnmatchcase(n, p) for n in layer.names)),
                default)  # fmt: skip


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out, columns) of a layer's weight as a matrix; (dimensions, rows) of a table."""
    shape = weight_shape(layer)
    if layer.kind in TURNED or layer.kind == "embedding":
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def groups_of(layer: Layer) -> int:
    """Groups of a convolution; 1 for every other layer."""
    from graphwright.ir.graph.nodes import full_arguments

    return int(full_arguments(layer.node)[0][6]) if layer.kind in CONVOLUTIONS else 1


def shapes(layer: Layer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a and b for one kind of layer.

    A linear layer has a (rank, in) and b (out, rank); a convolution a (rank, in / groups, *kernel)
    and b (out, rank / groups, 1, ...); a table a (rows, rank), looked up, and b (dim, rank).
    """
    shape = weight_shape(layer)
    out, columns = matrix_shape(layer)
    if layer.kind in CONVOLUTIONS:
        ones = (1,) * (len(shape) - 2)
        return (rank, *shape[1:]), (out, rank // groups_of(layer), *ones)
    if layer.kind == "embedding":
        return (columns, rank), (out, rank)
    return (rank, columns), (out, rank)


def through(branch: Branch, layer: Layer, a: fx.Node, dropout: float = 0.0) -> fx.Node:
    """a(x): the layer's input brought to the rank."""
    x = branch.input
    if layer.kind in CONVOLUTIONS:
        rest = branch.arguments[3:7]
        target: Any = layer.node.target
        low = branch.add(target, x, a, None, *rest)
    elif layer.kind == "embedding":
        low = branch.add(
            aten.embedding.default, a, *branch.arguments[INPUT_ARGUMENT["embedding"] :]
        )
    else:
        low = branch.add(aten.linear.default, x, a)
    branch.dropped(dropout, low)
    return low


def back(branch: Branch, layer: Layer, low: fx.Node, b: fx.Node) -> fx.Node:
    """b(low): from the rank to the layer's outputs."""
    if layer.kind not in CONVOLUTIONS:
        return branch.add(aten.linear.default, low, b)
    spatial = len(weight_shape(layer)) - 2
    convolution = getattr(aten, f"conv{spatial}d").default
    ones, zeros = [1] * spatial, [0] * spatial
    return branch.add(convolution, low, b, None, ones, zeros, ones, groups_of(layer))


def add_low_rank(
    branch: Branch, layer: Layer, a: fx.Node, b: fx.Node, scale: float, dropout: float = 0.0
) -> None:
    """Adds s b(a(x)) to the layer's output. The factor goes where the fewest values are."""
    branch.scale = scale
    low = through(branch, layer, a, dropout)
    if scale != 1.0:
        low = branch.add(aten.mul.Scalar, low, scale)
    branch.finish(branch.add(aten.add.Tensor, branch.tip, back(branch, layer, low, b)))


def change(layer: Adapted, a: Tensor, b: Tensor) -> Tensor:
    """b a as a change of the layer's weight, in its own shape."""
    if layer.kind == "embedding":
        return a @ b.t()
    if layer.kind in CONVOLUTIONS:
        rank = a.shape[0] // layer.groups
        left = b.flatten(1).reshape(layer.groups, -1, rank)
        right = a.flatten(1).reshape(layer.groups, rank, -1)
        return (left @ right).reshape(layer.weight.shape)
    return (b @ a).t() if layer.kind in TURNED else b @ a


def with_change(layer: Adapted) -> Merged:
    """The layer's weight with s b a added, and its bias."""
    b = layer.parts["lora_b"]
    b = spread(b, layer.parts[SLOTS]) if SLOTS in layer.parts else b
    delta = change(layer, layer.parts["lora_a"], b)
    return layer.weight + layer.scale * delta, layer.bias


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(fan in), as `nn.Linear` draws its weight."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
