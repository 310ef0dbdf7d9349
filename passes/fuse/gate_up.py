"""fuse.gate_up: the two projections of a gated unit become one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphwright.passes.fuse._parallel.base import ParallelPass, linear_behind

PASSING = frozenset({
    "relu", "silu", "gelu", "sigmoid", "tanh", "elu", "hardswish", "mish", "softplus",
    "leaky_relu", "dropout",
})  # fmt: skip
"""Calls between a projection and the product."""


class GateUp(ParallelPass):
    """Joins the linear layers whose results are multiplied, one behind an activation: gated units.

    act(gate(x)) * up(x), with any activation or none, becomes a product of x with both weights, one
    below the other, whose result is split. Names change: the layer is `gate_up` in the module that
    holds the others.

    A weight that another layer uses too, or that is computed in the graph, stays, with the reason.
    """

    what = "product of two projections of one activation"
    own = "gate_up"

    def sets(self, graph: fx.Graph) -> Iterator[list[fx.Node]]:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            found = [linear_behind(operand, PASSING) for operand in node.args[:2]]
            if found[0] is not None and found[1] is not None and found[0] is not found[1]:
                yield [layer for layer in found if layer is not None]
