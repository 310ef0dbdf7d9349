"""Gradients as forward calls, for graphs that are exported: no exporter has autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.errors import ModelError

aten = torch.ops.aten


def forward_calls(
    function: Callable[..., Any], examples: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> fx.GraphModule:
    """A function that calls autograd, as a module of forward calls alone, with free sizes.

    It is traced through autograd, and backward calls are decomposed to plain ones.

    Args:
        function: of tensors; differentiates by what it is given, not by `tensors`.
        examples: what it is given. Equal sizes get one symbol in the trace, so sizes that have
            nothing to do with each other have to differ. No tensor is given twice.
        tensors: weights that it reads, by name; attributes of the module under these names.

    Raises:
        ModelError: a call has no gradient, or one that no plain calls make; it is named.
    """
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    table = {
        **core_aten_decompositions(),
        aten.convolution_backward.default: _convolution_backward,
        aten.avg_pool2d_backward.default: _avg_pool2d_backward,
    }
    traced = make_fx(
        function, decomposition_table=table, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(*examples)
    for node in list(traced.graph.nodes):
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    left = [str(n.target) for n in traced.graph.nodes if "backward" in str(n.target)]
    if left:
        raise ModelError(
            f"the gradient calls {left[0]}, which is not written with forward calls",
            fix="Replace the operator that it belongs to.",
        )
    root = nn.Module()
    names = {id(tensor): name for name, tensor in tensors.items()}
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target))
        node.target = names.get(id(value), str(node.target))
        _put(root, node.target, value)
    return fx.GraphModule(root, traced.graph)


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes a tensor an attribute under a name with dots."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if not hasattr(root, last):
        root.register_buffer(last, tensor.detach())


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
    groups: int, output_mask: list[bool],
) -> tuple[Tensor, None, None]:  # fmt: skip
    """The part by the input of a convolution's backward call.

    That of a convolution is a transposed one, and the other way round, with the same weight.
    """
    if transposed:
        made = aten.convolution.default(
            grad, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
        )
        return made, None, None
    kernel = weight.shape[2:]
    missing = [
        x.shape[2 + i]
        - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(len(kernel))
    ]
    made = aten.convolution.default(
        grad, weight, None, stride, padding, dilation, True, missing, groups
    )
    return made, None, None


def _avg_pool2d_backward(
    grad: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int],
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Any:  # fmt: skip
    """A transposed convolution with equal weights, channel by channel.

    torch asks for `NotImplemented` where there is no such form.
    """
    if ceil_mode or (any(padding) and not count_include_pad):
        return NotImplemented
    height, width = kernel_size if len(kernel_size) == 2 else kernel_size * 2
    steps = (stride if len(stride) == 2 else stride * 2) or [height, width]
    around = padding if len(padding) == 2 else padding * 2
    channels = grad.shape[1]
    share = 1 / (divisor_override or height * width)
    weight = grad.new_full((channels, 1, height, width), share)
    return _convolution_backward(
        grad, x, weight, None, steps, around, [1, 1], False, [0, 0], channels, [True, False, False]
    )[0]
