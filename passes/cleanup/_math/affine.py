"""Arithmetic of folding a per-channel affine map into the layer before or behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers import kinds
from graphwright.ir.layers.kinds import operators

aten = torch.ops.aten

CONVOLUTIONS = operators(kinds.CONVOLUTIONS)
TRANSPOSED = operators(kinds.TRANSPOSED_CONVOLUTIONS)
LINEAR = aten.linear.default


def scale_and_shift(editor: Editor, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(s, t) of a batch norm in inference mode, float64, shape (channels,); None if not stored."""
    args, _ = full_arguments(norm)
    gamma, beta, mean, var = (editor.tensor(a) for a in args[1:5])
    if mean is None or var is None:
        return None
    if (gamma is None and args[1] is not None) or (beta is None and args[2] is not None):
        return None
    scale = 1.0 / torch.sqrt(var.detach().double() + args[7])
    if gamma is not None:
        scale = scale * gamma.detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift if beta is None else shift + beta.detach().double()


def statistics(editor: Editor, norm: fx.Node) -> dict[str, list[float]]:
    """gamma and beta of a norm as plain numbers, for passes that rebuild it."""
    args, _ = full_arguments(norm)
    gamma, beta, var = (editor.tensor(args[i]) for i in (1, 2, 4))
    assert var is not None
    ones, zeros = torch.ones_like(var), torch.zeros_like(var)
    return {
        "gamma": (ones if gamma is None else gamma.detach()).double().tolist(),
        "beta": (zeros if beta is None else beta.detach()).double().tolist(),
        "eps": [float(args[7])],
    }


def refuse_output_fold(editor: Editor, layer: fx.Node, norm: fx.Node) -> str | None:
    """The reason why the norm cannot go into `layer`, which feeds it; None when it can."""
    if layer.target not in {*CONVOLUTIONS, *TRANSPOSED, LINEAR}:
        return "no layer with a weight feeds it"
    if len(layer.users) > 1:
        return f"{layer.name} is also read by other nodes"
    if layer.target is LINEAR and layer.meta["val"].dim() != 2:
        return "the norm runs over another axis than the linear layer's outputs"
    rank = layer.args[1].meta["val"].dim()  # type: ignore[union-attr]
    if layer.target is not LINEAR and layer.meta["val"].dim() != rank:
        return f"{layer.name} runs without a batch axis"
    return _refuse_weight(editor, layer)


def _refuse_weight(editor: Editor, layer: fx.Node) -> str | None:
    weight, bias = layer.args[1], _bias(layer)
    if editor.tensor(weight) is None or (bias is not None and editor.tensor(bias) is None):
        return f"the weight of {layer.name} is computed in the graph"
    assert isinstance(weight, fx.Node)
    for stored in (weight, bias):
        if isinstance(stored, fx.Node) and len(editor.uses(str(stored.target))) > 1:
            return f"{layer.name} shares {stored.target} with another layer"
    return None


def _bias(layer: fx.Node) -> fx.Node | None:
    args, _ = full_arguments(layer)
    bias = args[2]
    return bias if isinstance(bias, fx.Node) else None


def _groups(layer: fx.Node) -> int:
    if layer.target is LINEAR:
        return 1
    args, kwargs = full_arguments(layer)
    # Both signatures have it seventh: conv*(x, w, b, stride, padding, dilation, groups),
    # conv_transpose*(x, w, b, stride, padding, output_padding, groups, dilation).
    return int(kwargs.get("groups", args[6] if len(args) > 6 else 1))


def fold_into_outputs(editor: Editor, layer: fx.Node, scale: Tensor, shift: Tensor) -> str:
    """w' = w * s over output channels, b' = b * s + t. Returns the layer's name."""
    weight, bias = editor.tensor(layer.args[1]), editor.tensor(_bias(layer))
    assert weight is not None
    w = weight.detach().double()
    if layer.target in TRANSPOSED:
        # Stored as (in, out / groups, ...): outputs of group g are scaled by the g-th part of s.
        groups = _groups(layer)
        per_input = scale.view(groups, 1, -1).expand(groups, w.shape[0] // groups, -1)
        folded = w * per_input.reshape(w.shape[0], w.shape[1], *[1] * (w.dim() - 2))
    else:
        folded = w * scale.view(-1, *[1] * (w.dim() - 1))
    b = torch.zeros_like(scale) if bias is None else bias.detach().double()
    _store(editor, layer, folded, b * scale + shift)
    return _layer_name(layer)


def refuse_input_fold(
    editor: Editor, norm: fx.Node, users: list[fx.Node], shift: Tensor
) -> str | None:
    """The reason why the norm cannot go into the one layer that reads it; None when it can."""
    if len(users) != 1:
        return f"{len(users)} nodes read it"
    layer = users[0]
    if layer.target not in {*CONVOLUTIONS, LINEAR} or layer.args[0] is not norm:
        return "no layer with a weight reads it"
    if layer.target is LINEAR and norm.meta["val"].dim() != 2:
        return "the linear layer runs over another axis than the norm's channels"
    if layer.target in CONVOLUTIONS and bool(shift.abs().max() > 0) and _pads(layer):
        return f"{layer.name} pads with zeros, which the norm would have shifted"
    return _refuse_weight(editor, layer)


def _pads(layer: fx.Node) -> bool:
    args, kwargs = full_arguments(layer)
    padding = kwargs.get("padding", args[4] if len(args) > 4 else 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(p != 0 for p in (padding if isinstance(padding, list | tuple) else [padding]))


def fold_into_inputs(editor: Editor, layer: fx.Node, scale: Tensor, shift: Tensor) -> str:
    """w' = w * s over input channels, b' = b + sum(w * t). Returns the layer's name."""
    weight, bias = editor.tensor(layer.args[1]), editor.tensor(_bias(layer))
    assert weight is not None
    w = weight.detach().double()
    groups, out = _groups(layer), w.shape[0]
    s = _per_output(scale, groups, out).reshape(out, -1, *[1] * (w.dim() - 2))
    t = _per_output(shift, groups, out).reshape(out, -1, *[1] * (w.dim() - 2))
    added = (w * t).flatten(1).sum(1)
    b = added if bias is None else bias.detach().double() + added
    _store(editor, layer, w * s, b)
    return _layer_name(layer)


def _per_output(values: Tensor, groups: int, out: int) -> Tensor:
    """Row o holds the values of the input channels that output channel o reads: (out, in/g)."""
    return values.view(groups, 1, -1).expand(groups, out // groups, -1).reshape(out, -1)


def _layer_name(layer: fx.Node) -> str:
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target).rpartition(".")[0] or str(weight.target)


def _store(editor: Editor, layer: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Puts new weight and bias under the layer's names; adds a bias where there was none."""
    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    old = editor.state[str(weight_node.target)]
    editor.set_state(str(weight_node.target), like(old, weight))
    bias_node = _bias(layer)
    if bias_node is not None:
        name = str(bias_node.target)
        editor.set_state(name, like(editor.state[name], bias))
        return
    name = editor.add_state(f"{_layer_name(layer)}.bias", like(old, bias))
    _set_argument(layer, "bias", 2, editor.get(name))


def _set_argument(node: fx.Node, name: str, position: int, value: Any) -> None:
    if name in node.kwargs or len(node.args) < position:
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.args = (*node.args[:position], value, *node.args[position + 1 :])


def like(old: Tensor, new: Tensor) -> Tensor:
    """`new` in the dtype, device and trainability of `old`."""
    value = new.to(dtype=old.dtype, device=old.device).contiguous()
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value


def split_over_concat(editor: Editor, norm: fx.Node) -> bool:
    """bn(cat(a, b)) -> cat(bn_a(a), bn_b(b)), where at least one branch can then fold it."""
    concat = norm.args[0]
    if not isinstance(concat, fx.Node) or concat.target is not aten.cat.default:
        return False
    args, _ = full_arguments(concat)
    parts = args[0]
    axis = int(args[1]) % concat.meta["val"].dim()
    if axis != 1 or len(concat.users) > 1 or full_arguments(norm)[0][5]:
        return False
    if scale_and_shift(editor, norm) is None:
        return False
    if all(refuse_output_fold(editor, part, norm) is not None for part in parts):
        return False
    widths = [part.meta["val"].shape[1] for part in parts]
    if not all(isinstance(width, int) for width in widths):
        return False
    normed, start = [], 0
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        normed.append(_slice_of_norm(editor, norm, part, index, slice(start, start + width)))
        start += width
    editor.replace(norm, editor.call(aten.cat.default, normed, 1, before=norm))
    editor.erase(concat)
    return True


def _slice_of_norm(
    editor: Editor, norm: fx.Node, part: fx.Node, index: int, channels: slice
) -> fx.Node:
    args, _ = full_arguments(norm)
    operands: list[Any] = []
    for argument in args[1:5]:
        if not isinstance(argument, fx.Node):
            operands.append(None)
            continue
        tensor = editor.state[str(argument.target)]
        name = editor.add_state(f"{argument.target}.part{index}", like(tensor, tensor[channels]))
        operands.append(editor.get(name))
    return editor.call(aten.batch_norm.default, part, *operands, *args[5:], before=norm, like=norm)
