"""Several layers in the place of one, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.products import bias_node, input_node
from graphwright.ir.layers.selectors import Layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Stage:
    """One of the new layers.

    Attributes:
        part: of its name: `fc` becomes `fc.<part>`.
        weight: as a linear layer or a convolution stores it.
        axes: spatial axes that it strides, pads and dilates as the old convolution did; the kernel
            has one place along the others.
        groups: of the convolution.
    """

    part: str
    weight: Tensor
    axes: tuple[int, ...] = ()
    groups: int = 1


def insert_stages(editor: Editor, uses: Sequence[Layer], stages: Sequence[Stage]) -> list[str]:
    """Puts the stages in the place of every use of a weight; the last one has the bias.

    Args:
        editor: of a copy of the program that the layers were found in.
        uses: all layers that read the weight; their bias keeps its name.
        stages: in order.

    Returns:
        Names of the stored weights.
    """
    old = editor.state[uses[0].weight]
    base = uses[0].weight.removesuffix(".weight")
    stored = [editor.add_state(f"{base}.{s.part}.weight", like(old, s.weight)) for s in stages]
    for layer in uses:
        by_name = {node.name: node for node in editor.graph.nodes}
        call, x = by_name[layer.node.name], by_name[input_node(layer).name]
        bias = bias_node(layer)
        bias = None if bias is None else by_name[bias.name]
        weights = [editor.get(name) for name in stored]
        insert = _convolutions if layer.kind in CONVOLUTIONS else _linear
        editor.replace(call, insert(editor, call, x, bias, stages, weights))
    return stored


def like(old: Tensor, value: Tensor) -> Tensor:
    """A value stored as the tensor is that it comes from: dtype, device, parameter or not."""
    made = value.detach().to(device=old.device, dtype=old.dtype).contiguous()
    return nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made


def _linear(
    editor: Editor,
    call: fx.Node,
    x: fx.Node,
    bias: fx.Node | None,
    stages: Sequence[Stage],
    weights: Sequence[fx.Node],
) -> fx.Node:
    for weight in weights[:-1]:
        x = editor.call(aten.linear.default, x, weight, before=call)
    if bias is None or bias.meta["val"].dim() == 1:
        return editor.call(aten.linear.default, x, weights[-1], bias, before=call)
    product = editor.call(aten.linear.default, x, weights[-1], before=call)
    return editor.call(aten.add.Tensor, product, bias, before=call)


def _convolutions(
    editor: Editor,
    call: fx.Node,
    x: fx.Node,
    bias: fx.Node | None,
    stages: Sequence[Stage],
    weights: Sequence[fx.Node],
) -> fx.Node:
    _, _, _, stride, padding, dilation, _ = full_arguments(call)[0]
    for stage, weight in zip(stages, weights, strict=True):
        rank = stage.weight.dim() - 2

        def own(values: Sequence[int], neutral: int, stage: Stage = stage, rank: int = rank) -> Any:
            every = [int(v) for v in values] * (rank if len(values) == 1 else 1)
            return [value if axis in stage.axes else neutral for axis, value in enumerate(every)]

        # In words, padding is right for all: a kernel of one place has none.
        pads = padding if isinstance(padding, str) else own(padding, 0)
        x = editor.call(
            call.target, x, weight, bias if stage is stages[-1] else None, own(stride, 1), pads,
            own(dilation, 1), stage.groups, before=call,
        )  # fmt: skip
    return x
