"""A layer with a weight as a product of matrices: y = rows @ matrix^T, for every kind of layer.

Calibration methods are written for linear layers. A convolution is one on the columns of its
windows, a grouped one is several side by side, and so is a stack of experts, each with rows of its
own (`ir/calibration/experts.py`); here is the one place that knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import (
    BIAS_ARGUMENT,
    EXPERTS,
    INPUT_ARGUMENT,
    TURNED,
    TURNED_EXPERTS,
    WEIGHT_ARGUMENT,
    at_place,
)
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program


@dataclass(frozen=True)
class Geometry:
    """The way a layer's rows are made from its input. Plain data, so that it travels to a worker.

    Attributes:
        kind: one of `PRODUCTS`.
        shape: of the weight.
        groups: of a convolution; experts of a stack.
        stride, padding, dilation: of a convolution; padding in elements, before and after each
            spatial dimension.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def is_convolution(self) -> bool:
        """Whether the rows are windows."""
        return self.kind.startswith("conv")

    @property
    def out(self) -> int:
        """Output channels; those of all experts together."""
        if self.kind in EXPERTS:
            return self.groups * self.shape[2 if self.kind in TURNED_EXPERTS else 1]
        return self.shape[1] if self.kind in TURNED else self.shape[0]

    @property
    def depth(self) -> int:
        """Length of a row."""
        return _product(self.shape) // self.out

    def rows_key(self) -> tuple[Any, ...]:
        """Equal for layers that make the same rows of the same input."""
        if not self.is_convolution:
            return ("rows",)
        return (self.shape[2:], self.groups, self.stride, self.padding, self.dilation)


def geometry(program: Program, layer: Layer) -> Geometry:
    """The geometry of a layer of a kind in `PRODUCTS`.

    Raises:
        ModelError: its weight is no matrix, or stack of matrices (a matmul with more dimensions).
    """
    args, _ = full_arguments(layer.node)
    weight = args[WEIGHT_ARGUMENT[layer.kind]]
    shape = tuple(int(size) for size in weight.meta["val"].shape)
    if layer.kind in EXPERTS:
        return Geometry(layer.kind, shape, groups=shape[0])
    if not layer.kind.startswith("conv"):
        if len(shape) != 2:
            raise ModelError(f"the weight of {layer.name!r} has {len(shape)} dimensions, not 2")
        return Geometry(layer.kind, shape)
    spatial = len(shape) - 2
    stride, dilation = _each(args[3], spatial), _each(args[5], spatial)
    return Geometry(
        layer.kind, shape, int(args[6]), stride, _padding(args[4], shape[2:], dilation), dilation
    )


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = [value] * count if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def _padding(
    value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in _each(value, len(kernel)))


def as_matrix(geometry: Geometry, weight: Tensor) -> Tensor:
    """(groups, out / groups, depth): the matrix of each group. A view where strides allow."""
    if geometry.kind in TURNED:
        return weight.t().unsqueeze(0)
    if geometry.kind in TURNED_EXPERTS:
        return weight.transpose(1, 2)
    return weight.reshape(geometry.groups, geometry.out // geometry.groups, -1)


def from_matrix(geometry: Geometry, matrix: Tensor) -> Tensor:
    """The weight of that matrix, contiguous; undoes `as_matrix`."""
    if geometry.kind in TURNED:
        return matrix[0].t().contiguous()
    if geometry.kind in TURNED_EXPERTS:
        return matrix.transpose(1, 2).contiguous()
    return matrix.reshape(geometry.shape).contiguous()


def rows(geometry: Geometry, x: Tensor) -> Tensor:
    """(groups, n, depth): what each row of outputs is a product of; not for experts."""
    if not geometry.is_convolution:
        return x.reshape(1, -1, x.shape[-1])
    spatial = len(geometry.stride)
    if x.dim() == spatial + 1:  # without a batch dimension
        x = x.unsqueeze(0)
    flat = [pad for pair in reversed(geometry.padding) for pad in pair]
    x = torch.nn.functional.pad(x, flat) if any(flat) else x
    for dim in range(spatial):
        reach = (geometry.shape[2 + dim] - 1) * geometry.dilation[dim] + 1
        x = x.unfold(2 + dim, reach, geometry.stride[dim])[..., :: geometry.dilation[dim]]
    # (batch, channels, *places, *kernel) -> (groups, batch * places, channels / groups * kernel)
    places, kernel = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
    x = x.permute(0, *places, 1, *kernel)
    x = x.reshape(-1, geometry.groups, geometry.depth)
    return x.transpose(0, 1)


def product(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's result for x, differentiable; not for experts."""
    if geometry.kind == "linear":
        return torch.nn.functional.linear(x, weight, bias)
    if not geometry.is_convolution:
        y = x @ weight
        return y if bias is None else y + bias
    flat = [pad for pair in reversed(geometry.padding) for pad in pair]
    x = torch.nn.functional.pad(x, flat) if any(flat) else x
    spatial = len(geometry.stride)
    convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[spatial]
    y = convolution(
        x, weight, bias, geometry.stride, [0] * spatial, geometry.dilation, geometry.groups
    )
    return y


def input_node(layer: Layer) -> fx.Node:
    """The activation that a layer reads."""
    node = layer.node.args[INPUT_ARGUMENT[layer.kind]]
    assert isinstance(node, fx.Node)
    return node


def weight_node(layer: Layer) -> fx.Node:
    """The node of a layer's weight: stored, or rebuilt in the graph."""
    node = at_place(layer.node, layer.place)
    assert isinstance(node, fx.Node)
    return node


def weight_key(layer: Layer) -> str:
    """Equal for layers whose weight is one and the same (tied), stored or rebuilt."""
    node = weight_node(layer)
    return str(node.target) if node.op == "get_attr" else f"%{node.name}"


def bias_node(layer: Layer) -> fx.Node | None:
    """The node of a layer's bias; None where it has none."""
    place = BIAS_ARGUMENT.get(layer.kind)
    if place is None or len(layer.node.args) <= place:
        return None
    node = layer.node.args[place]
    return node if isinstance(node, fx.Node) else None


def weight_value(program: Program, layer: Layer) -> Tensor:
    """The weight of a layer, also when compressed-weight nodes rebuild it. Detached."""
    return constant_value(program, weight_node(layer))


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
