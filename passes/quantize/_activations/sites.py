"""Places of activation quantizers at which integer kernels fuse: one quantizer per tensor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx

from graphwright.ir.layers.kinds import CONVOLUTIONS, INPUT_ARGUMENT, TRANSPOSED_CONVOLUTIONS
from graphwright.ir.layers.on_codes import PASS_THROUGH, RELU

aten = torch.ops.aten


@dataclass
class Sites:
    """Tensors that get a quantizer.

    Attributes:
        layers: calls that are computed on codes.
        inputs: tensor -> layers (node names) that read its quantized form.
        outputs: results of integer kernels; every reader takes the quantized form.
        same: a moved tensor -> the output it takes its parameters from.
    """

    layers: set[fx.Node] = field(default_factory=set)
    inputs: dict[fx.Node, set[str]] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def observed(self) -> list[fx.Node]:
        """Tensors whose range must be known, each once."""
        wanted = [*self.outputs, *(x for x in self.inputs if x not in self.same)]
        return list(dict.fromkeys(wanted))


def find_sites(graph: fx.Graph, layers: dict[fx.Node, str], *, outputs: bool) -> Sites:
    """Places of the quantizers.

    A convolution has an integer kernel only when its result is quantized too, behind its ReLU
    and never before; a sum or concatenation of such results then is one as well.

    Args:
        graph: the program's.
        layers: call of each layer to be quantized, and its kind.
        outputs: quantize results of convolutions (static quantization).
    """
    sites = Sites(set(layers))
    quantized: set[fx.Node] = set()
    for node in graph.nodes:
        kind = layers.get(node)
        if kind is not None:
            x = node.args[INPUT_ARGUMENT[kind]]
            _read(sites, x, node.name, quantized)
        is_bridge = outputs and _is_bridge(node, quantized)
        if is_bridge:
            for operand in _operands(node):
                _read(sites, operand, node.name, quantized)
        if is_bridge or (outputs and kind in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)):
            last = _activated(node)
            sites.outputs.append(last)
            quantized.add(last)
    return sites


def _read(sites: Sites, x: fx.Node, reader: str, quantized: Collection[fx.Node]) -> None:
    root = _root(x)
    if root in quantized:
        if root is not x:
            sites.same[x] = root
            sites.inputs.setdefault(x, set()).add(reader)
        return
    sites.inputs.setdefault(x, set()).add(reader)


def _root(x: fx.Node) -> fx.Node:
    """The tensor that x was moved from."""
    while x.op == "call_function" and x.target in PASS_THROUGH:
        source = x.args[0]
        assert isinstance(source, fx.Node)
        x = source
    return x


def _operands(node: fx.Node) -> list[fx.Node]:
    if node.target is aten.add.Tensor and not node.kwargs:
        return [a for a in node.args if isinstance(a, fx.Node)]
    if node.target is aten.cat.default:
        first = node.args[0]
        return (
            [a for a in first if isinstance(a, fx.Node)] if isinstance(first, list | tuple) else []
        )
    return []


def _is_bridge(node: fx.Node, quantized: Collection[fx.Node]) -> bool:
    operands = _operands(node)
    return len(operands) > 1 and all(_root(x) in quantized for x in operands)


def _activated(node: fx.Node) -> fx.Node:
    """The ReLU that alone reads the node, or the node: nothing may stand between them."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in RELU else node
