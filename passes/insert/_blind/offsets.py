"""Offsets that every value of a convolutional network reads its image at: an exact receptive field.

A value at a place depends on the image at that place plus each of its offsets, and on nothing
else. A network is blind where no output has the offset zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import full_arguments, gw_meta, op_name
from graphwright.ir.layers.kinds import CONVOLUTIONS, INPUT_ARGUMENT, KINDS, WEIGHT_ARGUMENT
from graphwright.ir.mode import NORMS

Offset = tuple[int, ...]
Offsets = frozenset[Offset]

LIKE_ITS_INPUT = frozenset({"dropout", "alias", "clone", "detach", "contiguous", "to", "prelu"})
"""Operators beside the pointwise ones that give every place what it reads there."""


class Window:
    """The taps of a convolution.

    Attributes:
        kernel, dilation: by axis.
    """

    def __init__(self, node: fx.Node) -> None:
        arguments, _ = full_arguments(node)
        kind = KINDS[node.target]
        weight = arguments[WEIGHT_ARGUMENT[kind]].meta["val"]
        self.kernel = tuple(int(k) for k in weight.shape[2:])
        axes = len(self.kernel)
        self.stride = _all_axes(arguments[3], axes)
        self.padding = arguments[4] if isinstance(arguments[4], str) else _all_axes(
            arguments[4], axes
        )  # fmt: skip
        self.dilation = _all_axes(arguments[5], axes)

    @property
    def refusal(self) -> str:
        """Why a place of its output is none of its input; empty where it is one."""
        if any(step != 1 for step in self.stride):
            return "it has a stride"
        if any(k % 2 == 0 for k in self.kernel):
            return "it has an even kernel"
        centred = tuple(d * (k // 2) for k, d in zip(self.kernel, self.dilation, strict=True))
        if self.padding not in ("same", centred):
            return "its padding does not keep the map's size"
        return ""

    def taps(self, *, centre: bool) -> Offsets:
        """Where it reads, with or without the middle."""
        reach = [
            [d * (tap - k // 2) for tap in range(k)]
            for k, d in zip(self.kernel, self.dilation, strict=True)
        ]
        found = frozenset(itertools.product(*reach))
        return found if centre else found - {(0,) * len(self.kernel)}


def _all_axes(given: Any, axes: int) -> tuple[int, ...]:
    found = tuple(int(v) for v in given)
    return found * axes if len(found) == 1 else found


def is_window(node: fx.Node) -> bool:
    """Whether a node is a convolution."""
    return KINDS.get(node.target) in CONVOLUTIONS


def read_of(node: fx.Node) -> fx.Node:
    """The value that a convolution reads."""
    source = node.args[INPUT_ARGUMENT[KINDS[node.target]]]
    assert isinstance(source, fx.Node)
    return source


def offsets(graph: fx.Graph, image: fx.Node, masked: set[fx.Node]) -> Mapping[fx.Node, Offsets]:
    """Offsets of every value that depends on the image.

    Args:
        graph: of the network, in inference mode.
        image: its placeholder (B, C, ...).
        masked: convolutions whose middle is not read.

    Raises:
        ModelError: an operator mixes places in another way than a centred convolution does.
    """
    axes = image.meta["val"].dim() - 2
    found: dict[fx.Node, Offsets] = {image: frozenset({(0,) * axes})}
    for node in graph.nodes:
        reads = [source for source in node.all_input_nodes if source in found]
        if node.op != "call_function" or not reads:
            continue
        if is_window(node):
            window = Window(node)
            if why := window.refusal or _computed_weight(node, reads):
                raise _unclear(node, why)
            taps = window.taps(centre=node not in masked)
            found[node] = _sums(found[read_of(node)], taps)
        elif _keeps_places(node, reads, image):
            found[node] = frozenset().union(*(found[source] for source in reads))
        elif isinstance(node.meta.get("val"), Tensor):
            raise _unclear(node, f"{op_name(node)} mixes places")
    return found


def _computed_weight(node: fx.Node, reads: list[fx.Node]) -> str:
    return "its weight depends on the image" if reads != [read_of(node)] else ""


def _sums(a: Offsets, b: Offsets) -> Offsets:
    return frozenset(tuple(map(sum, zip(p, q, strict=True))) for p in a for q in b)


def _keeps_places(node: fx.Node, reads: list[fx.Node], image: fx.Node) -> bool:
    """Whether every place of the result depends on that place of what is read alone."""
    target: Any = node.target
    value: Any = node.meta.get("val")
    places = image.meta["val"].shape[2:]
    same = isinstance(value, Tensor) and value.shape[2:] == places
    if not same or any(source.meta["val"].shape[2:] != places for source in reads):
        return False
    name = op_name(node)
    if name == "cat":
        return full_arguments(node)[0][1] in (1, 1 - value.dim())
    if node.target in NORMS:
        return True  # in inference mode: by stored statistics
    if name in ("chunk", "split", "split_with_sizes", "slice", "narrow"):
        return False
    return name in LIKE_ITS_INPUT or torch.Tag.pointwise in getattr(target, "tags", ())


def _unclear(node: fx.Node, why: str) -> ModelError:
    return ModelError(
        f"insert.blind_spot: it cannot be shown what {node.name!r} sees: {why}",
        where=str(gw_meta(node).get("source") or ""),
        fix="It takes networks of centred convolutions without strides, pointwise operators, batch "
        "norms and channel concatenation.",
    )
