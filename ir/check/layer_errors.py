"""Layer outputs of two programs side by side: the place where a chain's error arises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.check.fidelity import Fidelity, compare
from graphwright.ir.graph.cost import Cost, cost
from graphwright.ir.program import Program

DEFAULT_BUDGET = 256 << 20
"""Bytes of layer outputs of the original that are kept at a time."""


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's output, with everything before it changed too (so it accumulates).

    Attributes:
        name: the layer's module.
        kind: its operator.
        node: its node, of that name in both programs.
        error: distance of its output from the original's.
    """

    name: str
    kind: str
    node: str
    error: Fidelity


def layer_errors(
    original: Program,
    result: Program,
    inputs: Sequence[Tensor] | None = None,
    *,
    counted: Cost | None = None,
    budget: int = DEFAULT_BUDGET,
) -> list[LayerError]:
    """Errors at the layers that both programs still have, in execution order.

    Layers are calls that multiply matrices or hold weights. One that a pass removed or reshaped
    is left out, and so are layers beyond the memory budget.

    Args:
        original: the program before all passes.
        result: the program after them.
        inputs: one tensor per input; the original's examples when None.
        counted: `cost(original)`, where it is at hand.
        budget: bytes of outputs to keep.
    """
    kept = {node.name for node in result.graph.nodes if node.op == "call_function"}
    layers = [layer for layer in (counted or cost(original)).layers if layer.node in kept]
    inputs = original.examples if inputs is None else inputs
    reference = _Taps(original, {layer.node for layer in layers}, budget)
    with torch.no_grad():
        reference.run(*inputs)
        taps = _Comparison(result, reference.kept)
        taps.run(*result.filled(tuple(inputs)))
    return [
        LayerError(layer.name, layer.kind, layer.node, taps.errors[layer.node])
        for layer in layers
        if layer.node in taps.errors
    ]


class _Taps(fx.Interpreter):
    """Keeps the floating-point results of some nodes, until the budget is spent."""

    def __init__(self, program: Program, wanted: set[str], budget: int) -> None:
        super().__init__(program.running)
        self.wanted, self.left = wanted, budget
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, Tensor) and value.is_floating_point():
            size = value.numel() * value.element_size()
            if size <= self.left:
                self.left -= size
                self.kept[n.name] = value
        return value


class _Comparison(fx.Interpreter):
    """Compares the results of nodes with values kept from another program."""

    def __init__(self, program: Program, reference: dict[str, Tensor]) -> None:
        super().__init__(program.running)
        self.reference = reference
        self.errors: dict[str, Fidelity] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        expected = self.reference.pop(n.name, None)
        if expected is not None and isinstance(value, Tensor) and value.shape == expected.shape:
            self.errors[n.name] = compare(expected, value)
        return value
