"""Convolutions and transposed ones, with or without a batch axis."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter

aten = torch.ops.aten


def spread(value: Any, rank: int) -> list[Any]:
    """A per-axis argument given once or per axis, as a list."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


@translates(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
            aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def conv(
    e: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    kernel = [int(k) for k in weight.meta["val"].shape[2:]]
    rank = len(kernel)
    dilations = spread(dilation, rank)
    if isinstance(padding, str):
        total = [
            0 if padding == "valid" else d * (k - 1) for d, k in zip(dilations, kernel, strict=True)
        ]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = spread(padding, rank) * 2
    result = e.op(
        "Conv", _batch(e, x, rank), e.values[weight], None if bias is None else e.values[bias],
        kernel_shape=kernel, strides=spread(stride, rank), pads=pads, dilations=dilations,
        group=groups,
    )  # fmt: skip
    return _as_given(e, x, rank, result)


@translates(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    e: Emitter, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    kernel = [int(k) for k in weight.meta["val"].shape[2:]]
    rank = len(kernel)
    strides, dilations = spread(stride, rank), spread(dilation, rank)
    behind = spread(output_padding, rank)
    free = [i for i, size in enumerate(behind) if not isinstance(size, int)]
    for i in free:
        # As far as it may go; what is too much is cut off.
        behind[i] = max(strides[i], dilations[i]) - 1
    result = e.op(
        "ConvTranspose", _batch(e, x, rank), e.values[weight],
        None if bias is None else e.values[bias],
        kernel_shape=kernel, strides=strides, pads=spread(padding, rank) * 2,
        output_padding=behind, dilations=dilations, group=groups,
    )  # fmt: skip
    if free:
        sizes = node.meta["val"].shape[-rank:]
        ends = e.shape([sizes[i] for i in free])
        starts, axes = e.ints(*[0] * len(free)), e.ints(*[i + 2 for i in free])
        result = e.op("Slice", result, starts, ends, axes)
    return _as_given(e, x, rank, result)


def _batch(e: Emitter, x: fx.Node, rank: int) -> ir.Value:
    """The input with a batch axis."""
    value: ir.Value = e.values[x]
    return value if x.meta["val"].dim() == rank + 2 else e.op("Unsqueeze", value, e.ints(0))


def _as_given(e: Emitter, x: fx.Node, rank: int, value: ir.Value) -> ir.Value:
    """The result with a batch axis where the input has one."""
    return value if x.meta["val"].dim() == rank + 2 else e.op("Squeeze", value, e.ints(0))
