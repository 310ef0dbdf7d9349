"""A pixel shuffle along any axes: (batch, c * s1 * s2 .., n1, n2 ..) to (batch, c, n1 * s1, ..)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import arguments

aten = torch.ops.aten
RESHAPES = (aten.reshape.default, aten.view.default)


def shuffled(editor: Editor, x: fx.Node, stride: Sequence[int], before: fx.Node) -> fx.Node:
    """The shuffle of `x`: one call in two dimensions with one stride, else three."""
    if all(s == 1 for s in stride):
        return x
    if len(stride) == 2 and stride[0] == stride[1]:
        return editor.call(aten.pixel_shuffle.default, x, stride[0], before=before, like=before)

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, *args, before=before, like=before)

    rank = len(stride)
    shape = x.meta["val"].shape
    channels = int(shape[1]) // math.prod(stride)
    sizes = [
        int(size) if isinstance(size, int) else call(aten.sym_size.int, x, axis)
        for axis, size in enumerate(shape)
    ]
    apart = call(aten.reshape.default, x, [sizes[0], channels, *stride, *sizes[2:]])
    turned = call(aten.permute.default, apart, shuffle_order(rank))
    grown = [
        n * s if isinstance(n, int) else call(operator.mul, n, s)
        for n, s in zip(sizes[2:], stride, strict=True)
    ]
    return call(aten.reshape.default, turned, [sizes[0], channels, *grown])


def shuffle_order(rank: int) -> list[int]:
    """The permutation of (batch, channels, *phases, *places) that puts phases behind places."""
    return [0, 1, *(axis for n in range(rank) for axis in (2 + rank + n, 2 + n))]


def shuffle_of(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(its operand, stride) of a shuffle's last call; None for any other node."""
    if node.target is aten.pixel_shuffle.default:
        source, factor = node.args[:2]
        assert isinstance(source, fx.Node)
        assert isinstance(factor, int)
        return source, (factor, factor)
    if node.target not in RESHAPES:
        return None
    turned = node.args[0]
    if not isinstance(turned, fx.Node) or turned.target is not aten.permute.default:
        return None
    apart = turned.args[0]
    if not isinstance(apart, fx.Node) or apart.target not in RESHAPES:
        return None
    source = apart.args[0]
    if not isinstance(source, fx.Node) or len(turned.users) > 1 or len(apart.users) > 1:
        return None
    small, middle, large = (n.meta["val"].shape for n in (source, apart, node))
    rank = len(small) - 2
    order = [int(axis) % len(middle) for axis in arguments(turned)["dims"]]
    if rank not in (1, 2, 3) or len(middle) != 2 + 2 * rank or order != shuffle_order(rank):
        return None
    stride = tuple(middle[2 : 2 + rank])
    if not all(isinstance(s, int) for s in stride) or middle[1] * math.prod(stride) != small[1]:
        return None
    places = zip(small[2:], middle[2 + rank :], large[2:], stride, strict=True)
    if any(a != b or c != a * s for a, b, c, s in places) or large[1] != middle[1]:
        return None
    return source, stride
