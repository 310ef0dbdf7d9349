"""Counts the quantized layers that run as integer kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.optimized import INTEGER_KERNELS, OptimizedGraph
from graphwright.ir.layers.kinds import SEVERAL, TABLES
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program


def quantized_layers(program: Program) -> list[Layer]:
    """Layers whose weight is int8 codes with a scale, tables apart, in graph order."""
    return [
        layer for layer in layers(program)
        if layer.kind not in TABLES and _holds_codes(weight_node(layer))
    ]  # fmt: skip


def _holds_codes(weight: Any) -> bool:
    is_rebuilt = isinstance(weight, fx.Node) and (
        weight.target is torch.ops.graphwright.dequantize.default
    )
    return is_rebuilt and weight.args[0].meta["val"].dtype == torch.int8


def codes_name(layer: Layer) -> str:
    """Name of the stored codes of one of `quantized_layers`."""
    return str(weight_node(layer).all_input_nodes[0].target)


def integer_kernels(
    quantized: list[Layer], values: Mapping[str, Any], graph: OptimizedGraph
) -> dict[str, Any]:
    """The number of quantized layers, the number of integer kernels among them, and the others'
    names.

    Args:
        quantized: the layers.
        values: node name of a layer -> its result, or results, in the model as it was written.
        graph: what the session runs.

    Returns:
        `quantized`, `integer`, and `float`: layer name -> the kernel in its place.
    """
    left = {}
    for layer in quantized:
        value = values.get(layer.node.name)
        value = value[0] if isinstance(value, list | tuple) else value
        kernel = graph.kernel(None if value is None else value.producer())
        if kernel not in INTEGER_KERNELS:
            is_one = kernel and layer.kind not in (*SEVERAL, "bilinear")  # else several kernels
            left[layer.name] = str(kernel) if is_one else layer.kind
    return {"quantized": len(quantized), "integer": len(quantized) - len(left), "float": left}
