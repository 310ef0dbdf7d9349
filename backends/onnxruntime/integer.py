"""Counts the quantized layers that run as integer kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.optimized import INTEGER_KERNELS, OptimizedGraph
from graphwright.ir.layers.kinds import WEIGHT_ARGUMENT
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program

TABLES = ("embedding",)
"""Layers that multiply nothing."""


def quantized_layers(program: Program) -> list[Layer]:
    """Layers whose weight is int8 codes with a scale, tables apart, in graph order."""
    return [
        layer for layer in layers(program)
        if layer.kind not in TABLES and _holds_codes(layer.node.args[WEIGHT_ARGUMENT[layer.kind]])
    ]  # fmt: skip


def _holds_codes(weight: Any) -> bool:
    is_rebuilt = isinstance(weight, fx.Node) and (
        weight.target is torch.ops.graphwright.dequantize.default
    )
    return is_rebuilt and weight.args[0].meta["val"].dtype == torch.int8


def integer_kernels(
    quantized: list[Layer], values: Mapping[str, ir.Value], graph: OptimizedGraph
) -> dict[str, Any]:
    """The number of quantized layers, the number of integer kernels among them, and the others'
    names.

    Args:
        quantized: the layers.
        values: node name of a layer -> its result in the model as it was written.
        graph: what the session runs.

    Returns:
        `quantized`, `integer`, and `float`: layer name -> the kernel in its place.
    """
    left = {}
    for layer in quantized:
        value = values.get(layer.node.name)
        kernel = graph.kernel(None if value is None else value.producer())
        if kernel not in INTEGER_KERNELS:
            left[layer.name] = kernel or layer.kind
    return {"quantized": len(quantized), "integer": len(quantized) - len(left), "float": left}
