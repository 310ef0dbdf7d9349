"""Chains: a layer whose channels go through batch norm and activation to the layers that read them.

What UDFC can repair: whatever happens to such a layer's channels, only the input columns of its
readers have to change. The channel groups say which columns those are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.classes import Ids
from graphwright.ir.graph.nodes import full_arguments, op_name
from graphwright.ir.layers.kinds import OUTPUT_AXIS, PRODUCTS
from graphwright.ir.layers.products import geometry
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program

ELEMENTWISE = {
    "relu", "relu6", "hardtanh", "leaky_relu", "gelu", "silu", "hardswish", "elu", "sigmoid",
    "tanh", "clamp", "clamp_min", "clamp_max", "hardsigmoid", "mish", "softplus", "selu",
}  # fmt: skip
"""Activations: the same function of every value."""

SPATIAL = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
    "mean", "flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "dropout",
    "permute", "transpose", "clone", "upsample_nearest2d", "upsample_bilinear2d",
}  # fmt: skip
"""Calls that channels may go through on their way to a reader, each by itself."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels.

    Attributes:
        layer: the reader.
        columns: (channels, places) positions on its weight's input axis; empty for a depthwise
            convolution, which has one filter per channel.
    """

    layer: Layer
    columns: Tensor

    @property
    def is_depthwise(self) -> bool:
        """Whether it cannot mix channels."""
        return self.columns.numel() == 0


@dataclass(frozen=True)
class Chain:
    """A producer, what its channels go through, and its readers.

    Attributes:
        group: of the channels.
        producer: the layer that makes them.
        norm: batch norm right behind it, if any.
        activations: elementwise calls behind that, in order.
        readers: all layers that read the channels.
        units: (channels,) unit of the group that each channel of the producer is.
    """

    group: ChannelGroup
    producer: Layer
    norm: fx.Node | None
    activations: tuple[fx.Node, ...]
    readers: tuple[Reader, ...]
    units: Tensor

    def activation(self, x: Tensor) -> Tensor:
        """The elementwise calls, as a function of pre-activations."""
        for node in self.activations:
            x = node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return x

    @property
    def is_homogeneous(self) -> bool:
        """Whether twice the pre-activation gives twice the activation, as behind a ReLU."""
        x = torch.linspace(-8, 8, 65, dtype=torch.float64)
        return torch.equal(self.activation(2 * x), 2 * self.activation(x.clone()))

    @property
    def can_mix(self) -> bool:
        """Whether every reader can read a mixture of channels."""
        return not any(reader.is_depthwise for reader in self.readers)


def find_chain(program: Program, group: ChannelGroup, stored: Collection[str]) -> Chain | str:
    """The chain of a group, or why it is none.

    Args:
        program: that the group was found on.
        group: of channels.
        stored: names of weights that may change; others are rebuilt from compressed ones.
    """
    if not group.prunable:
        return group.reason
    members = {(m.parameter, m.dim) for m in group.members}
    every = [layer for layer in layers(program, PRODUCTS) if layer.weight]
    makes = [layer for layer in every if (layer.weight, OUTPUT_AXIS[layer.kind]) in members]
    depthwise = [layer for layer in makes if _is_depthwise(program, layer)]
    producers = [layer for layer in makes if layer not in depthwise]
    if len(producers) != 1:
        names = ", ".join(layer.name for layer in producers[:3]) or "no layer"
        return f"its channels are made by {names} together"
    producer = producers[0]
    if producer.weight not in stored:
        return f"the weight of {producer.name} is computed in the graph"
    if geometry(program, producer).groups > 1:
        return f"{producer.name} is a grouped convolution: its filters read different inputs"
    if group.units != geometry(program, producer).out:
        return f"a unit is more than a channel of {producer.name}"
    if len(program.graph.find_nodes(op="get_attr", target=producer.weight)[0].users) > 1:
        return f"the weight of {producer.name} is used more than once"
    readable = {layer.node: layer for layer in every if layer.weight in stored}
    return _followed(program, group, producer, readable)


def _is_depthwise(program: Program, layer: Layer) -> bool:
    g = geometry(program, layer)
    return g.groups > 1 and g.groups == g.out and g.shape[1] == 1


def _followed(
    program: Program, group: ChannelGroup, producer: Layer, every: dict[fx.Node, Layer]
) -> Chain | str:
    """Walks from the producer to its readers."""
    made = group.analysis.stored[producer.weight, OUTPUT_AXIS[producer.kind]]
    paths: set[tuple[fx.Node, ...]] = set()
    readers: list[Reader] = []
    for path, end in _paths(producer.node):
        layer = every.get(end)
        if layer is None or end.args[0 if layer.kind != "addmm" else 1] is not path[-1]:
            return f"{end.name} stands between {producer.name} and what reads it"
        functions = tuple(n for n in path[1:] if op_name(n) not in SPATIAL)
        paths.add(functions)
        if len(program.graph.find_nodes(op="get_attr", target=layer.weight)[0].users) > 1:
            return f"the weight of {layer.name} is used more than once"
        reader = _reader(program, group, layer, made)
        if isinstance(reader, str):
            return reader
        readers.append(reader)
    if len(paths) != 1:
        return f"the readers of {producer.name} see different functions of it"
    functions = paths.pop()
    norm = functions[0] if functions and op_name(functions[0]) == "batch_norm" else None
    activations = functions[1:] if norm is not None else functions
    if any(op_name(n) == "batch_norm" for n in activations):
        return f"a batch norm follows the activation of {producer.name}"
    if norm is not None and full_arguments(norm)[0][3] is None:
        return f"the batch norm {norm.name} keeps no running statistics"
    units = torch.from_numpy(np.searchsorted(np.sort(group.classes), made))
    units = torch.from_numpy(np.argsort(group.classes))[units]
    return Chain(group, producer, norm, activations, tuple(readers), units)


def _paths(start: fx.Node) -> Iterator[tuple[tuple[fx.Node, ...], fx.Node]]:
    """(nodes from `start` on, the first node that is no function of single channels)."""
    stack: list[tuple[fx.Node, ...]] = [(start,)]
    while stack:
        path = stack.pop()
        for user in path[-1].users:
            name = op_name(user)
            passes_on = name in ELEMENTWISE or name in SPATIAL or name == "batch_norm"
            if passes_on and user.args[0] is path[-1]:
                stack.append((*path, user))
            else:
                yield path, user


def _reader(program: Program, group: ChannelGroup, layer: Layer, made: Ids) -> Reader | str:
    """The columns of a reader by channel; a reason where it reads in another way.

    Args:
        made: (channels,) classes of the producer's channels.
    """
    if _is_depthwise(program, layer):
        return Reader(layer, torch.empty(0, dtype=torch.int64))
    if geometry(program, layer).groups > 1:
        return f"{layer.name} is a grouped convolution: it cannot mix channels"
    axis = 1 - OUTPUT_AXIS[layer.kind]
    classes = torch.from_numpy(group.analysis.stored[layer.weight, axis])
    rows = [(classes == int(c)).nonzero()[:, 0] for c in made]
    if len({len(row) for row in rows}) != 1 or not len(rows[0]):
        return f"{layer.name} does not read all channels alike"
    return Reader(layer, torch.stack(rows))
