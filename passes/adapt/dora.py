"""adapt.dora: a low-rank change of a weight's direction, and its size trained apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::add_low_rank
from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import CONVOLUTIONS, TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.adapter import weight_shape
from graphwright.passes.adapt._form.low_rank import (
    RankPass,
    ScaledOptions,
    back,
    change,
    groups_of,
    kaiming,
    matrix_shape,
    rank_of,
    scale_of,
    shapes,
    through,
)

aten = torch.ops.aten
ours = torch.ops.graphwright


class DoraOptions(ScaledOptions):
    """Options of adapt.dora."""


class Dora(RankPass[DoraOptions]):
    """Lets every chosen layer compute with m (W + s b a) / ||W + s b a||, row by row.

    a and b turn the rows of the weight, m holds their lengths; both are trained. The length that
    is divided by counts as a constant in the gradient. Rows are those of the outputs, and a
    convolution's length is over its whole kernel.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equations 5 and 11.
    """

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        rank, scale = rank_of(options, layer), scale_of(options, layer)
        size_a, size_b = shapes(layer, rank)
        a, b = kaiming(size_a, generator), torch.zeros(size_b)
        add_decomposed(branch, layer, a, b, None, scale, options.dropout)
        return f"rank {rank}, {matrix_shape(layer)[0]} lengths"

    def refusal(self, layer: Layer) -> str:
        super().refusal(layer)
        if groups_of(layer) > 1:
            return "a grouped convolution's rows have no low-rank change that groups share"
        return ""

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        parts: Any = layer.parts
        a, b, magnitude = parts["lora_a"], parts["lora_b"], parts["magnitude"]
        whole = layer.weight + layer.scale * change(layer, a, b)
        rows = whole.t() if layer.kind in TURNED else whole.flatten(1)
        rows = rows * (magnitude / rows.norm(dim=1))[:, None]
        new = rows.t() if layer.kind in TURNED else rows.reshape(whole.shape)
        return new.contiguous(), layer.bias


def add_decomposed(
    branch: Branch,
    layer: Layer,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> None:
    """Lets a layer compute with m (W + s b a) / ||W + s b a||.

    Args:
        branch: beside the layer.
        layer: the layer.
        a: in the shape that `shapes` says.
        b: likewise.
        magnitude: m (out,); the lengths of the weight's rows when None.
        scale: s.
        dropout: probability on the input, for the low-rank part and what the ratio adds.
    """
    branch.scale = scale
    stored_a, stored_b = branch.parameter("lora_a", a), branch.parameter("lora_b", b)
    matrix = _matrix(branch, layer)
    if magnitude is None:
        magnitude = constant_value(branch.editor, matrix).double().norm(dim=1)
    lengths = branch.parameter("magnitude", magnitude)
    ratio = _ratio(branch, layer, matrix, (stored_a, stored_b, lengths))
    entered = low = through(branch, layer, stored_a)
    if scale != 1.0:
        low = branch.add(aten.mul.Scalar, low, scale)
    turned = branch.add(aten.mul.Tensor, back(branch, layer, low, stored_b), ratio)
    if dropout:
        again = _once_more(branch, layer, matrix)
        branch.dropped(dropout, entered, again)
        more = branch.add(aten.mul.Tensor, again, branch.add(aten.sub.Scalar, ratio, 1.0))
        own = branch.add(aten.add.Tensor, branch.tip, more)
    else:
        own = _scaled_output(branch, layer, ratio)
    branch.finish(branch.add(aten.add.Tensor, own, turned))


def _ratio(
    branch: Branch, layer: Layer, matrix: fx.Node, stored: tuple[fx.Node, fx.Node, fx.Node]
) -> fx.Node:
    """m / ||W + s b a|| of every output, in the shape of the layer's channels."""
    a, b, lengths = stored
    if layer.kind in CONVOLUTIONS:
        a, b = (branch.add(aten.flatten.using_ints, part, 1) for part in (a, b))
    a, b = (branch.add(aten.detach.default, part) for part in (a, b))
    if branch.scale != 1.0:
        b = branch.add(aten.mul.Scalar, b, branch.scale)
    whole = branch.add(ours.add_low_rank.default, matrix, b, a)
    length = branch.add(aten.linalg_vector_norm.default, whole, 2, [1])
    return _as_channels(branch, layer, branch.add(aten.div.Tensor, lengths, length))


def _scaled_output(branch: Branch, layer: Layer, ratio: fx.Node) -> fx.Node:
    """The layer's output times the ratio, but not its bias."""
    own = branch.add(aten.mul.Tensor, branch.tip, ratio)
    bias = branch.bias()
    if bias is None:
        return own
    kept = branch.add(aten.rsub.Scalar, ratio, 1.0)
    kept = branch.add(aten.mul.Tensor, _as_channels(branch, layer, bias), kept)
    return branch.add(aten.add.Tensor, own, kept)


def _once_more(branch: Branch, layer: Layer, matrix: fx.Node) -> fx.Node:
    """W x by a call of its own, which can read another x."""
    if layer.kind in CONVOLUTIONS:
        rest = branch.arguments[3:7]
        return branch.add(layer.node.target, branch.input, branch.weight, None, *rest)
    return branch.add(aten.linear.default, branch.input, matrix)


def _matrix(branch: Branch, layer: Layer) -> fx.Node:
    """The layer's weight as a matrix (out, columns)."""
    if layer.kind in TURNED:
        return branch.add(aten.transpose.int, branch.weight, 0, 1)
    if layer.kind in CONVOLUTIONS:
        return branch.add(aten.flatten.using_ints, branch.weight, 1)
    return branch.weight


def _as_channels(branch: Branch, layer: Layer, vector: fx.Node) -> fx.Node:
    """One number per output in the shape in which it meets the layer's output."""
    if layer.kind not in CONVOLUTIONS:
        return vector
    spatial = len(weight_shape(layer)) - 2
    return branch.add(aten.reshape.default, vector, [-1, *(1,) * spatial])
