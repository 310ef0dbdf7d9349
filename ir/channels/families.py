"""Kinds of channel groups: the residual stream, attention heads, embeddings, and all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
from torch import fx

from graphwright.ir.channels.analysis import ATTENTIONS, Analysis
from graphwright.ir.channels.groups import ChannelGroup
from graphwright.ir.channels.values import Value
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.graph.nodes import op_name

Family = Literal["residual", "heads", "embeddings", "hidden"]
"""`residual`: channels of a sum of two activations; `heads`: those that attention works on, its
queries, keys and values; `embeddings`: the width of an embedding table; `hidden`: none of these."""

SUMS = ("add", "add_")
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


def families(groups: Iterable[ChannelGroup]) -> dict[ChannelGroup, tuple[Family, ...]]:
    """The kinds of every group; the stream of a language model is of two."""
    found: dict[ChannelGroup, tuple[Family, ...]] = {}
    classes: dict[str, np.ndarray] = {}
    for group in groups:
        if not classes:
            classes = _classes(group.analysis)
        own = [name for name, flags in classes.items() if flags[group.classes].any()]
        found[group] = tuple(f for f in get_args(Family) if f in own) or ("hidden",)
    return found


def _classes(analysis: Analysis) -> dict[str, np.ndarray]:
    """Flags per class of every kind but `hidden`."""
    flags = {name: np.zeros(analysis.count, bool) for name in ("residual", "heads", "embeddings")}
    for node in analysis.program.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        moving = [a for a in operands if depends_on_input(a)]
        if name in SUMS and len(moving) == 2:
            one, other = (_of(analysis, node) for node in moving)
            flags["residual"][np.intersect1d(one, other)] = True
        elif name in ATTENTIONS or (name in PRODUCTS and len(moving) > 1):
            for operand in moving[:3]:
                flags["heads"][_of(analysis, operand)] = True
        elif name == "embedding":
            flags["embeddings"][_of(analysis, node)] = True
    return flags


def _of(analysis: Analysis, node: fx.Node) -> np.ndarray:
    """Classes that a node's value carries."""
    value = analysis.values.get(node.name)
    if not isinstance(value, Value) or not value.factors:
        return np.zeros(0, np.int64)
    ids = np.concatenate([f.ids.ravel() for f in value.factors])
    return np.asarray(np.unique(analysis.class_of[ids]))
