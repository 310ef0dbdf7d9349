"""Literal sizes of normalizations behind a cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from graphwright.ir.channels.literals import Literals, handler, scale_literal
from graphwright.ir.channels.walk import arguments

aten = torch.ops.aten


@handler("layer_norm")
def _layer_norm(literals: Literals, node: fx.Node) -> None:
    from graphwright.ir.ops.divisor_norm import divisor_layer_norm

    given = arguments(node)
    last = len(literals.value(node).shape) - 1
    if literals.keep(given["input"], last) is None:
        return
    width = given["normalized_shape"][0]
    operands = (given["input"], given["weight"], given["bias"])
    new = literals.put(node, divisor_layer_norm, *operands, width, given["eps"])
    literals.stand_in(node, new)


@handler("divisor_layer_norm")
def _divisor_layer_norm(literals: Literals, node: fx.Node) -> None:
    """Already in the divisor form: nothing but its weights changes."""


@handler("rms_norm")
def _rms_norm(literals: Literals, node: fx.Node) -> None:
    """x / sqrt(sum/d + eps) = sqrt(d/d') * x / sqrt(sum/d' + eps d/d')."""
    given = arguments(node)
    value = literals.value(node)
    keep = literals.keep(given["input"], len(value.shape) - 1)
    if keep is None:
        return
    kept, width = int(keep.sum()), len(keep)
    eps = given["eps"]
    if eps is None:
        eps = torch.finfo(node.meta["val"].dtype).eps
    literals.set(node, normalized_shape=[kept], eps=eps * width / kept)
    scale_literal(literals, node, (width / kept) ** 0.5)


@handler("group_norm")
def _group_norm(literals: Literals, node: fx.Node) -> None:
    given = arguments(node)
    keep = literals.keep(given["input"], 1)
    if keep is None:
        return
    groups = given["num_groups"]
    if groups > 1:
        literals.set(node, num_groups=int(keep.reshape(groups, -1).any(1).sum()))
        return
    _whole_group_norm(literals, node, given, int(keep.sum()) / len(keep))


def _whole_group_norm(
    literals: Literals, node: fx.Node, given: dict[str, Any], ratio: float
) -> None:
    """GroupNorm with one group, divisor form: mean and variance over the original C*H*W."""
    x, rank = given["input"], len(literals.value(node).shape)
    dims, put = list(range(1, rank)), partial(literals.put, node)
    mean = put(aten.mul.Tensor, put(aten.mean.dim, x, dims, True), ratio)
    centred = put(aten.sub.Tensor, x, mean)
    spread = put(aten.mean.dim, put(aten.mul.Tensor, centred, centred), dims, True)
    spread = put(aten.mul.Tensor, spread, ratio)
    square = put(aten.mul.Tensor, put(aten.mul.Tensor, mean, mean), 1.0 - ratio)
    variance = put(aten.add.Tensor, put(aten.add.Tensor, spread, square), given["eps"])
    result = put(aten.mul.Tensor, centred, put(aten.rsqrt.default, variance))
    for name, target in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if given[name] is not None:
            shape = [-1, *[1] * (rank - 2)]
            result = put(target, result, put(aten.reshape.default, given[name], shape))
    literals.stand_in(node, result)
