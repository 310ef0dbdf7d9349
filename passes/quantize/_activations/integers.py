"""Integer codes and quantizers, put into a copy of a program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import CONVOLUTIONS, OUTPUT_AXIS, TRANSPOSED_CONVOLUTIONS
from graphwright.ir.layers.products import Geometry, from_matrix, input_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import rebuild_channels, replace_stored, replace_weight
from graphwright.passes.quantize._activations.sites import Sites
from graphwright.passes.quantize._math import int8 as int8_math

ops = torch.ops.graphwright


@dataclass(frozen=True)
class Quantized:
    """Codes of one stored weight, as `graphwright::dequantize` takes them.

    Attributes:
        codes, scale, axis: as the op takes them.
        stack: of a stack of experts, whose codes are the rows of all matrices; else None.
    """

    codes: Tensor
    scale: Tensor
    axis: int
    stack: Geometry | None = None

    def value(self) -> Tensor:
        """The weight that the codes stand for."""
        value: Tensor = ops.dequantize(self.codes, self.scale, None, self.axis)
        if self.stack is None:
            return value
        return from_matrix(self.stack, value.unflatten(0, (self.stack.groups, -1)))


def conv_bias(program: Program, layer: Layer) -> Tensor | None:
    """The stored bias of a convolution; None for anything else."""
    if layer.kind not in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS) or len(layer.node.args) < 3:
        return None
    bias = layer.node.args[2]
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    return program.state[str(bias.target)].detach()


class Inserter:
    """Puts codes and quantizers into a copy of the program."""

    def __init__(
        self,
        program: Program,
        by: str,
        sites: Sites,
        ranges: dict[fx.Node, tuple[float, int]],
        is_static: bool,
    ) -> None:
        self.editor = Editor(program, by=by)
        self.twin = dict(zip(program.graph.nodes, self.editor.graph.nodes, strict=True))
        self.sites = sites
        self.ranges = ranges
        self.is_static = is_static

    def run(self, layers: list[Layer], weights: dict[tuple[str, int], Quantized]) -> Program:
        self._weights(layers, weights)
        for x, readers in self.sites.inputs.items():
            node = self.twin[x]
            quantized = self._quantizer(node, x)
            for user in list(node.users):
                if user.name in readers:
                    user.replace_input_with(node, quantized)
        for y in self.sites.outputs:
            node = self.twin[y]
            quantized = self._quantizer(node, y)
            node.replace_all_uses_with(quantized, delete_user_cb=lambda u, q=quantized: u is not q)
        return self.editor.finish()

    def _quantizer(self, node: fx.Node, original: fx.Node) -> fx.Node:
        before = _behind(node)
        if not self.is_static:
            return self.editor.call(
                ops.fake_quantize_dynamic.default, node, before=before, like=node
            )
        scale, zero_point = self.ranges[original]
        return self.editor.call(
            ops.fake_quantize.default, node, scale, zero_point, 0, 255, before=before, like=node
        )

    def _weights(self, layers: list[Layer], weights: dict[tuple[str, int], Quantized]) -> None:
        """Codes in the place of every weight; layers that read one along one axis share them."""
        readers: dict[tuple[str, int], list[Layer]] = {}
        for layer in layers:
            readers.setdefault((layer.weight, OUTPUT_AXIS[layer.kind]), []).append(layer)
        for key, members in readers.items():
            made = weights[key]
            nodes = {self.twin[layer.node] for layer in members}
            make = rebuild_channels(made.codes, made.scale, made.axis)
            is_stack = made.stack is not None
            replace_weight(self.editor, members[0], make, matrix=is_stack, readers=nodes)
            for layer in members:
                self._bias(layer, made)

    def _bias(self, layer: Layer, quantized: Quantized) -> None:
        bias = conv_bias(self.editor.program, layer)
        if bias is None or layer.node not in self.sites.layers:
            return
        scale = quantized.scale * self.ranges[input_node(layer)][0]
        node = self.twin[layer.node]
        old = node.args[2]
        assert isinstance(old, fx.Node)
        make = rebuild_channels(int8_math.bias_codes(bias, scale), scale, 0)
        replace_stored(self.editor, node, old, make)


def _behind(node: fx.Node) -> fx.Node:
    """Right behind the node; behind all inputs when it is one."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
