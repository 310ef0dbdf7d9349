"""Layers at which a network may make its image smaller, and the network that does so elsewhere."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.skips import Skip, find_skips
from graphwright.ir.layers.kinds import CONVOLUTIONS, TABLE
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.program import Program

aten = torch.ops.aten

STRIDE = 3
"""Position of the strides among the arguments of a convolution."""

MOST_PATHS = 2000
"""Choices of places that are looked at; more are refused."""

Path = tuple[int, ...]
"""For every place 1 where it halves the image, else 0."""


@dataclass(frozen=True)
class Place:
    """A convolution that may halve the image, alone or as the first of a residual block.

    Attributes:
        name: of the layer.
        node: name of its call.
        projection: name of the call on the skip past it; empty where there is none.
        join: name of the sum behind it, where a skip without a projection goes past; else empty.
        source: name of that skip's tensor.
        halves: whether it does so in the given program.
    """

    name: str
    node: str
    projection: str
    join: str
    source: str
    halves: bool


def find_places(program: Program, targets: Sequence[str]) -> list[Place]:
    """The places in the order of the graph, the first layer of the network not being one.

    Raises:
        ModelError: no place halves the image, or every one does: there is nothing to choose.
    """
    chosen = {layer.node for layer in select(program, targets, CONVOLUTIONS)}
    convolutions = layers(program, CONVOLUTIONS)
    names = {layer.node: layer.name for layer in convolutions}
    inside: dict[fx.Node, Skip] = {}
    for skip in sorted(find_skips(program), key=lambda skip: len(skip.body)):
        if skip.kind == "add":
            for node in (*skip.body, *skip.projection):
                inside.setdefault(node, skip)
    found, seen = [], set()
    for layer in convolutions[1:]:
        beside = inside.get(layer.node)
        if beside is None:
            if layer.node in chosen and _is_wide(layer.node) and _stride(layer.node):
                found.append(_alone(layer))
        elif beside.join not in seen:
            seen.add(beside.join)
            place = _of_block(beside, names)
            found += [place] if place is not None and _node(beside, place) in chosen else []
    count = sum(place.halves for place in found)
    if count in (0, len(found)):
        what = "none of them halves" if count == 0 else "every one halves"
        raise ModelError(
            f"search.pooling: {len(found)} layers may halve the image, and {what} it",
            fix="Widen `targets`, or give a network with convolutions of stride 2.",
        )
    return found


def paths(places: Sequence[Place]) -> list[Path]:
    """Every choice of as many places as halve the image now; the given one is the first.

    Raises:
        ModelError: there are too many.
    """
    count = sum(place.halves for place in places)
    if math.comb(len(places), count) > MOST_PATHS:
        raise ModelError(
            f"search.pooling: {math.comb(len(places), count)} ways to choose {count} of "
            f"{len(places)} layers; {MOST_PATHS} at most are searched",
            fix="Narrow `targets`.",
        )
    given = tuple(int(place.halves) for place in places)
    chosen = itertools.combinations(range(len(places)), count)
    every = [tuple(int(i in picks) for i in range(len(places))) for picks in chosen]
    return [given, *(path for path in every if path != given)]


def restrided(program: Program, places: Sequence[Place], path: Path, by: str) -> Program:
    """The program that halves the image at other places, with the same tensors.

    Skips go along: a projection gets the stride of its block, and a skip without one takes every
    other place.

    Raises:
        ModelError: a later layer needs the sizes that were there.
    """
    editor = Editor(program, by=by)
    nodes = {node.name: node for node in editor.graph.nodes}
    for place, bit in zip(places, path, strict=True):
        if bool(bit) == place.halves:
            continue
        _set_stride(editor, nodes[place.node], 1 + bit)
        if place.projection:
            _set_stride(editor, nodes[place.projection], 1 + bit)
        elif place.join:
            _halve_skip(editor, nodes[place.join], nodes[place.source])
    result = editor.finish(propagate=True) if editor.changed else program
    before, after = _output_shapes(program), _output_shapes(result)
    if before != after:
        raise ModelError(
            f"{by}: outputs of {before} would be of {after} with strides at "
            f"{[place.name for place, bit in zip(places, path, strict=True) if bit]}",
            fix="Narrow `targets` to layers of one path through the network.",
        )
    return result


def _output_shapes(program: Program) -> list[tuple[Any, ...]]:
    outputs: Any = program.graph.output_node().args[0]
    return [tuple(node.meta["val"].shape) for node in outputs]


def _alone(layer: Layer) -> Place:
    return Place(layer.name, layer.node.name, "", "", "", _stride(layer.node) == 2)


def _of_block(skip: Skip, names: dict[fx.Node, str]) -> Place | None:
    """The place of a residual block: the layer that halves, or the first one that sees neighbours;
    None where strides and skip do not fit together."""
    body = [node for node in skip.body if node in names]
    strided = [node for node in body if _stride(node) == 2]
    wide = [node for node in body if _is_wide(node)]
    node = next(iter([*strided, *wide]), None)
    if node is None or len(strided) > 1 or not all(_stride(n) for n in body):
        return None
    halves = _stride(node) == 2
    if skip.projection:
        (projection,) = skip.projection
        if projection not in names or _stride(projection) != (2 if halves else 1):
            return None
        return Place(names[node], node.name, projection.name, "", "", halves)
    if halves:  # by a skip that our rewrite does not know
        return None
    return Place(names[node], node.name, "", skip.join.name, skip.source.name, halves)


def _node(skip: Skip, place: Place) -> fx.Node:
    return next(node for node in skip.body if node.name == place.node)


def _is_wide(node: fx.Node) -> bool:
    """Whether a convolution looks at neighbours."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return bool(max(weight.meta["val"].shape[2:]) > 1)


def _stride(node: fx.Node) -> int:
    """1 or 2 along all axes; 0 for any other."""
    stride = node.args[STRIDE] if len(node.args) > STRIDE else 1
    values = set(stride) if isinstance(stride, list | tuple) else {stride}
    return int(values.pop()) if values in ({1}, {2}) else 0


def _set_stride(editor: Editor, node: fx.Node, stride: int) -> None:
    args = [*node.args, *[None] * (STRIDE - len(node.args))]  # a bias may be left out
    strides = [stride] * TABLE[_kind(node)].spatial
    editor.set_args(node, *args[:STRIDE], strides, *args[STRIDE + 1 :], **dict(node.kwargs))


def _kind(node: fx.Node) -> str:
    return next(name for name in CONVOLUTIONS if node.target in TABLE[name].operators)


def _halve_skip(editor: Editor, join: fx.Node, source: fx.Node) -> None:
    """Gives a sum every other place of a skip. (A block that halves by a skip without a projection
    is no place, so that the reverse is never asked for.)"""
    kept = source
    for axis in range(2, source.meta["val"].dim()):
        kept = editor.call(aten.slice.Tensor, kept, axis, 0, sys.maxsize, 2, before=join, like=join)
    args = tuple(kept if arg is source else arg for arg in join.args)
    editor.set_args(join, *args, **dict(join.kwargs))
