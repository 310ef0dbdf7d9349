"""The parts of a program that integer kernels compute: quantizers, and what runs on their codes."""

from __future__ import annotations

import torch
from torch import fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::fake_quantize and its kin
from graphwright.ir.graph.constants import constant_nodes

aten = torch.ops.aten
ops = torch.ops.graphwright

QUANTIZERS = (ops.fake_quantize.default, ops.fake_quantize_dynamic.default)

PASS_THROUGH = frozenset(
    {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
     aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.transpose.int,
     aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor,
     aten.contiguous.default}
)  # fmt: skip
"""Ops that only move values or pick the largest: they run on codes, with the same parameters."""

RELU = frozenset({aten.relu.default})
"""Activations that integer kernels have built in."""

BRIDGES = frozenset({aten.add.Tensor, aten.cat.default})
"""Ops that have an integer kernel where all of their operands are codes."""


def computed_on_codes(graph: fx.Graph) -> set[fx.Node]:
    """Quantizers, layers with quantized inputs and weights, what stands between, and their weights.

    Kernels find these by their pattern, from float32 to float32: a cast inside would break it, and
    round what the codes stand for.
    """
    constants = constant_nodes(graph)
    coded: set[fx.Node] = set()  # values of codes
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in constants:
            continue
        read = [n for n in node.all_input_nodes if n not in constants]
        is_on_codes = bool(read) and all(n in coded for n in read)
        if node.target in QUANTIZERS or (is_on_codes and node.target in PASS_THROUGH):
            coded.add(node)
            found.add(node)
            continue
        is_kernel = is_on_codes and (node.target in BRIDGES or _has_codes(node, constants))
        if is_kernel or (node.target in RELU and read[0] in found - coded):
            found.add(node)
    for node in list(found):
        found |= _behind([n for n in node.all_input_nodes if n in constants])
    return found


def _has_codes(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether a call reads a constant that is rebuilt from int8 codes."""
    read = _behind([n for n in node.all_input_nodes if n in constants])
    return any(n.target is ops.dequantize.default for n in read)


def _behind(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
