"""What operators make of a `Convolved`: a rule per operator.

Channels are on axis 1 of (batch, channels, *axes), and last where there are no axes: linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.folding.convolved import Convolved, NotFoldable
from graphwright.ir.graph.constants import Stored, constant_value, depends_on_input
from graphwright.ir.graph.nodes import arguments, op_name

Maps = Mapping[fx.Node, Convolved]

CONVOLUTION_NAMES = tuple(f"conv{rank}d" for rank in (1, 2, 3))
MAX = 2**63 - 1

EXPANDING = ("expand", "reshape", "repeat")
"""Calls that make a border of a value per channel."""

ROUNDINGS = 16
"""Roundings that a border computed from the statistics of a norm may have gone through."""


def made_by(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    """The map of a call whose operands have theirs in `maps`.

    Raises:
        NotFoldable: the result is no convolution; the reason begins with what the node does.
    """
    rule = RULES[op_name(node)]
    return rule(program, node, maps)


def data_operands(node: fx.Node) -> list[fx.Node]:
    """Operands of a supported call that carry its data: tensors that depend on an input.

    None of them for a call that no rule is for.
    """
    if node.op != "call_function" or op_name(node) not in RULES:
        return []
    found = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return [n for n in found if depends_on_input(n) and not _is_frame(n)]


def channel_axis(node: fx.Node, axes: int) -> int:
    """The axis of a node's channels."""
    return 1 if axes else int(node.meta["val"].dim()) - 1


def _first(node: fx.Node, maps: Maps) -> Convolved:
    found = maps.get(node.args[0])  # type: ignore[arg-type]
    if found is None:
        raise NotFoldable("its first operand is a constant")
    return found


def _convolution(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    given = arguments(node)
    y = _first(node, maps)
    weight, bias = _stored(program, given["weight"]), _stored(program, given["bias"])
    assert weight is not None
    axes = weight.dim() - 2
    stride, dilation = _each(given["stride"], axes), _each(given["dilation"], axes)
    if isinstance(given["padding"], str):
        full = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        same = given["padding"] == "same"
        padding = [(n // 2, n - n // 2) if same else (0, 0) for n in full]
    else:
        padding = [(p, p) for p in _each(given["padding"], axes)]
    return y.convolved(weight, bias, stride, padding, dilation, int(given["groups"]))


def _linear(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    weight, bias = (_stored(program, arguments(node)[name]) for name in ("weight", "bias"))
    assert weight is not None
    return _first(node, maps).convolved(weight, bias, (), [], (), 1)


def _batch_norm(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    given, y = arguments(node), _first(node, maps)
    if given["training"]:
        raise NotFoldable("is in training mode; its statistics still move")
    mean, variance = (_stored(program, given[n]) for n in ("running_mean", "running_var"))
    if mean is None or variance is None:
        raise NotFoldable("keeps no running statistics")
    gamma, beta = (_stored(program, given[n]) for n in ("weight", "bias"))
    scale = 1 / torch.sqrt(variance + given["eps"])
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    return y.scaled(scale, shift if beta is None else shift + beta)


def _average(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    given, y = arguments(node), _first(node, maps)
    size = _each(given["kernel_size"], y.axes)
    stride = _each(given["stride"] or size, y.axes)
    padding = _each(given["padding"], y.axes)
    if given["ceil_mode"]:
        raise NotFoldable("rounds its size up")
    if any(padding) and not given["count_include_pad"] and not given.get("divisor_override"):
        raise NotFoldable("divides by fewer places at the border (count_include_pad=False)")
    count = given.get("divisor_override") or torch.Size(size).numel()
    channels = len(y.bias)
    weight = torch.full((channels, 1, *size), 1 / count, dtype=torch.float64)
    return y.convolved(weight, None, stride, [(p, p) for p in padding], (1,) * y.axes, channels)


def _sum(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    sign = float(node.kwargs.get("alpha", 1)) * (-1.0 if op_name(node) == "sub" else 1.0)  # type: ignore[arg-type]
    left, right = node.args[:2]
    one, two = (maps.get(a) if isinstance(a, fx.Node) else None for a in (left, right))
    if one is not None and two is not None:
        return one.plus(two, sign)
    y = one or two
    assert y is not None
    constant = _per_channel(program, right if one is not None else left, node, y)
    unit = torch.ones_like(constant)
    return y.scaled(unit, sign * constant) if one is not None else y.scaled(unit * sign, constant)


def _times(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    operands = [maps.get(a) if isinstance(a, fx.Node) else None for a in node.args[:2]]
    if all(m is not None for m in operands):
        raise NotFoldable("multiplies two parts of the stretch")
    place = 0 if operands[0] is not None else 1
    y = operands[place]
    assert y is not None
    constant = _per_channel(program, node.args[1 - place], node, y)
    if op_name(node) == "div":
        if place == 1 or node.kwargs.get("rounding_mode"):
            raise NotFoldable("divides a constant, or rounds")
        constant = 1 / constant
    return y.scaled(constant, torch.zeros_like(constant))


def _negated(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    y = _first(node, maps)
    return y.scaled(-torch.ones_like(y.bias), torch.zeros_like(y.bias))


def _pad(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    given, y = arguments(node), _first(node, maps)
    if given.get("mode", "constant") != "constant":
        raise NotFoldable(f"pads with mode {given['mode']}")
    amounts = list(given["pad"])
    if len(amounts) > 2 * y.axes or not all(isinstance(a, int) for a in amounts):
        raise NotFoldable("pads channels, the batch, or by an amount that is no number")
    value = torch.full_like(y.bias, float(given.get("value") or 0))
    for number in range(len(amounts) // 2):
        axis, ends = y.axes - 1 - number, (amounts[2 * number], amounts[2 * number + 1])
        if min(ends) < 0:
            y = y.cropped(axis, (max(0, -ends[0]), max(0, -ends[1])))
            ends = (max(0, ends[0]), max(0, ends[1]))
        if ends != (0, 0):
            y = y.padded(axis, ends, value)
    return y


def _slice(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    given, y = arguments(node), _first(node, maps)
    start, end = given["start"] or 0, MAX if given["end"] is None else given["end"]
    axis = int(given["dim"]) % node.meta["val"].dim() - 2
    is_number = isinstance(start, int) and isinstance(end, int)
    if is_number and start == 0 and end == MAX and given["step"] == 1:
        return y
    if axis < 0 or not is_number or given["step"] != 1 or start < 0 or 0 <= end < MAX:
        raise NotFoldable("is a slice that is not cut from both ends by numbers")
    return y.cropped(axis, (start, 0 if end == MAX else -end))


def _concatenation(program: Stored, node: fx.Node, maps: Maps) -> Convolved:
    given = arguments(node)
    parts: Sequence[fx.Node] = given["tensors"]
    axis = int(given["dim"]) % node.meta["val"].dim()
    first = next(maps[p] for p in parts if p in maps)
    if axis == channel_axis(node, first.axes):
        if not all(p in maps for p in parts):
            raise NotFoldable("joins the stretch with something else")
        made = maps[parts[0]]
        for part in parts[1:]:
            made = made.joined(maps[part])
        return made
    inside = [p for p in parts if p in maps]
    if len(inside) != 1 or axis < 2:
        raise NotFoldable("joins along an axis that a convolution cannot")
    place = list(parts).index(inside[0])
    y = maps[inside[0]]
    for part in reversed(parts[:place]):
        y = y.padded(axis - 2, (_width(part, axis), 0), *_frame(program, part, y))
    for part in parts[place + 1 :]:
        y = y.padded(axis - 2, (0, _width(part, axis)), *_frame(program, part, y))
    return y


def _is_frame(node: fx.Node) -> bool:
    """Whether a node is a constant, expanded to sizes of the input."""
    while op_name(node) in EXPANDING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if not depends_on_input(node):
            return True
    return False


def _width(part: fx.Node, axis: int) -> int:
    size = part.meta["val"].shape[axis]
    if not isinstance(size, int):
        raise NotFoldable("has a border whose width is no number")
    return size


def _frame(program: Stored, part: fx.Node, y: Convolved) -> tuple[Tensor, float]:
    """A border's value per channel, and how far its own rounding may have moved it."""
    node = part
    while op_name(node) in EXPANDING and _values(node) != len(y.bias):
        node = node.args[0]  # type: ignore[assignment]
    stored = constant_value(program, node)
    value = stored.double()
    rounding = ROUNDINGS * torch.finfo(stored.dtype).eps * float(value.abs().max())
    if value.numel() == 1:
        return value.reshape(()).expand(len(y.bias)), rounding
    if value.numel() != len(y.bias) or len(y.bias) not in value.shape:
        raise NotFoldable("has a border that is not one value per channel")
    return value.reshape(-1), rounding


def _values(node: fx.Node) -> int:
    """Number of values; -1 where sizes of the input decide."""
    shape = node.meta["val"].shape
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else -1


def _per_channel(program: Stored, operand: Any, node: fx.Node, y: Convolved) -> Tensor:
    """A constant operand as (channels,)."""
    if isinstance(operand, int | float):
        return torch.full_like(y.bias, float(operand))
    if not isinstance(operand, fx.Node) or depends_on_input(operand):
        raise NotFoldable("reads something besides the stretch")
    value = constant_value(program, operand).double()
    rank = int(node.meta["val"].dim())
    shape = [1] * (rank - value.dim()) + list(value.shape)
    axis = channel_axis(node, y.axes)
    if len(shape) > rank or any(size != 1 for n, size in enumerate(shape) if n != axis):
        raise NotFoldable("has a constant that is not one value per channel")
    return value.reshape(-1).expand(len(y.bias))


def _stored(program: Stored, node: Any) -> Tensor | None:
    """A stored operand in float64; None where there is none."""
    if node is None:
        return None
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise NotFoldable("has a weight that is computed in the graph")
    return program.state[str(node.target)].detach().double()


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * axes if len(values) == 1 else values))


RULES: dict[str, Callable[[Stored, fx.Node, Maps], Convolved]] = {
    **dict.fromkeys(CONVOLUTION_NAMES, _convolution),
    "linear": _linear,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average),
    "add": _sum,
    "sub": _sum,
    "mul": _times,
    "div": _times,
    "neg": _negated,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "slice": _slice,
    "cat": _concatenation,
}
"""By the operator's name."""

LAYERS = (*CONVOLUTION_NAMES, "linear", "avg_pool1d", "avg_pool2d", "avg_pool3d")
"""Operators that mix places or channels; the others act on every value by itself."""
