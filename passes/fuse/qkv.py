"""fuse.qkv: the projections of an attention's queries, keys and values become one layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphwright.ir.layers.heads import FUSED
from graphwright.passes.fuse._parallel.base import ParallelPass, linear_behind

PASSING = frozenset({
    "reshape", "view", "transpose", "permute", "contiguous", "unsqueeze", "expand", "flatten",
    "unflatten", "clone", "to", "mul", "add", "rms_norm", "layer_norm", "slice", "cat", "neg",
    "repeat_interleave", "squeeze",
})  # fmt: skip
"""Calls between a projection and the attention: heads, rotations, norms of heads."""


class Qkv(ParallelPass):
    """Joins the linear layers whose results one attention reads, and that read one activation.

    Their weights stand one below the other, and the result is split: one product instead of three,
    or of two where queries come from elsewhere (cross-attention). Rotations of positions, norms of
    heads and shared heads may stand between the layers and the attention. Names change: the layer
    is `qkv` in the module that holds the others.

    A weight that another layer uses too, or that is computed in the graph, stays, with the reason.
    """

    what = "projections of one attention that read one activation"
    own = "qkv"

    def sets(self, graph: fx.Graph) -> Iterator[list[fx.Node]]:
        for node in graph.nodes:
            if node.target not in FUSED:
                continue
            found = [linear_behind(operand, PASSING) for operand in node.args[:3]]
            layers = [layer for layer in dict.fromkeys(found) if layer is not None]
            for x in dict.fromkeys(layer.args[0] for layer in layers):
                yield [layer for layer in layers if layer.args[0] is x]
