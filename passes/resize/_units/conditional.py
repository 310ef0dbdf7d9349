"""Convolutions whose kernel is a mixture of experts, chosen for every sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.graph.sizes import shape_of
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.passes.base import Action

aten = torch.ops.aten

SPREAD = 1e-2
"""Size of the noise that tells the experts apart at the start, relative to the kernel's values."""


def add_experts(
    program: Program,
    targets: Sequence[str],
    experts: int,
    generator: torch.Generator,
    by: str,
) -> tuple[Program, list[Action]]:
    """Puts mixtures of kernels in the place of convolutions.

    y = sum_e a_e(x) (W_e * x), a = softmax(R mean(x) + r): the experts start as the kernel and a
    little noise, R and r at zero, so that the function nearly is what it was. Where the batch is
    one sample, the kernels are mixed first, and one convolution is run; else all are run as one
    convolution with as many times the outputs, and their results are mixed.

    Args:
        program: left as it is.
        targets: selector of convolutions.
        experts: kernels of each.
        generator: of the noise.
        by: id of the pass.

    Source: P21; Yang et al. 2019, "CondConv", with the softmax that keeps the sum of the weights
    at 1.
    """
    editor = Editor(program, by)
    nodes = {node.name: node for node in editor.graph.nodes}
    actions = []
    for layer in select(program, targets):
        if layer.kind not in CONVOLUTIONS:
            actions.append(Action.left(layer.name, f"{layer.kind} is no convolution", "kept"))
        elif not layer.weight or len(program.aliases.get(layer.weight, ())) > 1:
            actions.append(Action.left(layer.name, "its weight is shared or in codes", "kept"))
        else:
            _mix(editor, nodes[layer.node.name], layer, experts, generator)
            actions.append(Action(layer.name, f"{experts} experts"))
    return editor.finish(), actions


def _mix(
    editor: Editor, node: fx.Node, layer: Layer, experts: int, generator: torch.Generator
) -> None:
    x, _, bias, stride, padding, dilation, groups = full_arguments(node)[0]
    weight = editor.state[layer.weight].detach()
    noise = torch.randn(experts, *weight.shape, generator=generator, dtype=weight.dtype)
    kernels = weight + noise * (SPREAD * weight.square().mean().sqrt())
    inputs, spatial = int(shape_of(x.meta["val"])[1]), weight.dim() - 2

    def parameter(part: str, value: Tensor) -> fx.Node:
        name = editor.add_state(f"{layer.name}.{part}", nn.Parameter(value))
        return editor.get(name)

    bank = parameter("expert_weight", kernels.flatten(1))
    route = parameter("router.weight", torch.zeros(experts, inputs, dtype=weight.dtype))
    shift = parameter("router.bias", torch.zeros(experts, dtype=weight.dtype))

    def call(target: object, *args: object) -> fx.Node:
        return editor.call(target, *args, before=node, like=node)

    pooled = call(aten.mean.dim, x, list(range(2, 2 + spatial)))
    shares = call(aten.softmax.int, call(aten.linear.default, pooled, route, shift), -1)
    options = (stride, padding, dilation)
    if shape_of(x.meta["val"])[0] == 1:
        mixed = call(aten.view.default, call(aten.matmul.default, shares, bank), list(weight.shape))
        result = call(node.target, x, mixed, bias, *options, groups)
    else:
        outputs = weight.shape[0]
        # groups outermost, so that every group of the wide convolution has the experts' outputs
        wide = call(aten.view.default, bank,
                    [experts, groups, outputs // groups, *weight.shape[1:]])  # fmt: skip
        turned = call(aten.transpose.int, wide, 0, 1)
        stacked = call(aten.reshape.default, turned, [experts * outputs, *weight.shape[1:]])
        every = call(node.target, x, stacked, None, *options, groups)
        split = call(aten.unflatten.int, every, 1, [groups, experts, outputs // groups])
        factors = call(aten.view.default, shares, [-1, 1, experts, *([1] * (spatial + 1))])
        summed = call(aten.sum.dim_IntList, call(aten.mul.Tensor, split, factors), [2])
        result = call(aten.flatten.using_ints, summed, 1, 2)
        if bias is not None:
            shaped = call(aten.view.default, bias, [1, -1, *([1] * spatial)])
            result = call(aten.add.Tensor, result, shaped)
    editor.replace(node, result)
