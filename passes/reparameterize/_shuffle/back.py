"""A convolution whose phases a shuffle moves to places, as a transposed convolution.

Plain tap t of phase f is tap s * (T - 1 - t) + f of a transposed convolution with stride s, of
which the plain one's padding and slices behind the shuffle keep a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import arguments
from graphwright.passes.reparameterize._shuffle.shuffle import shuffle_of

aten = torch.ops.aten
END = 2**63 - 1


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution that stands for nodes from `source` to `last`.

    Attributes:
        source: its input.
        last: the node that it replaces.
        weight: (in, out / groups, *kernel).
        stride, padding, output_padding, groups: its own.
    """

    source: fx.Node
    last: fx.Node
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int

    @property
    def phases(self) -> int:
        """Channels of the plain convolution for each of its own."""
        return math.prod(self.stride)


def transposed_form(editor: Editor, conv: fx.Node) -> Transposed | str | None:
    """The form of a plain convolution; why it has none; None where no shuffle reads it."""
    shuffle = _shuffle_behind(conv)
    if shuffle is None:
        return None
    given = arguments(conv)
    found = shuffle_of(shuffle)
    assert found is not None
    stride = found[1]
    weight, bias = editor.tensor(given["weight"]), editor.tensor(given["bias"])
    if weight is None or (bias is None and given["bias"] is not None):
        return "its weight is computed in the graph"
    rank = len(stride)
    if _each(given["stride"], rank) != [1] * rank or _each(given["dilation"], rank) != [1] * rank:
        return "it has a stride or a dilation"
    phases, groups = math.prod(stride), int(given["groups"])
    if (weight.shape[0] // phases) % groups:
        return "its groups cut through the phases of a channel"
    if bias is not None and not torch.equal(bias, bias[::phases].repeat_interleave(phases)):
        return "its bias differs between the phases of a channel"
    if isinstance(given["padding"], str):
        return "its padding is given as a word"
    own = [(p, p) for p in _each(given["padding"], rank)]
    source, pads = _with_pad(given["input"], own)
    last, cuts = _with_slices(shuffle, rank)
    full = _full(weight.detach(), stride, groups)
    padding, more = [], []
    for axis, s in enumerate(stride):
        taps = weight.shape[2 + axis]
        begin, end = (s * (taps - 1 - pads[axis][n]) + cuts[axis][n] for n in (0, 1))
        full, zeros = _trimmed(full, 2 + axis)
        begin, end = begin - zeros[0], end - zeros[1]
        if begin < 0 or not 0 <= begin - end < max(s, 1):
            return f"no transposed convolution has its padding along axis {axis}"
        padding.append(begin)
        more.append(begin - end)
    return Transposed(source, last, full, stride, tuple(padding), tuple(more), groups)


def _shuffle_behind(conv: fx.Node) -> fx.Node | None:
    """The last call of the shuffle that alone reads a convolution."""
    node = conv
    for _ in range(3):
        readers = _readers(node)
        if len(readers) != 1:
            return None
        node = readers[0]
        found = shuffle_of(node)
        if found is not None:
            return node if found[0] is conv else None
    return None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users that read its values, not only its sizes."""
    return [user for user in node.users if isinstance(user.meta.get("val"), Tensor)]


def _full(weight: Tensor, stride: tuple[int, ...], groups: int) -> Tensor:
    """(out * phases, in / groups, *taps) as (in, out / groups, *(taps * stride))."""
    rank, rows = len(stride), weight.shape[1]
    taps = weight.shape[2:]
    apart = weight.reshape(groups, -1, *stride, rows, *taps).flip(*range(3 + rank, 3 + 2 * rank))
    order = [0, 2 + rank, 1, *(a for n in range(rank) for a in (3 + rank + n, 2 + n))]
    turned = apart.permute(order)
    sizes = [t * s for t, s in zip(taps, stride, strict=True)]
    return turned.reshape(groups * rows, turned.shape[2], *sizes)


def _trimmed(weight: Tensor, axis: int) -> tuple[Tensor, tuple[int, int]]:
    """Without slices of zeros at both ends of an axis, and how many there were."""
    used = [n for n in range(weight.shape[axis]) if bool((weight.select(axis, n) != 0).any())]
    if not used:
        return weight, (0, 0)
    first, last = used[0], used[-1]
    kept = weight.narrow(axis, first, last - first + 1)
    return kept, (first, weight.shape[axis] - 1 - last)


def _with_pad(x: fx.Node, own: list[tuple[int, int]]) -> tuple[fx.Node, list[tuple[int, int]]]:
    """The tensor before zeros were put around it, and all zeros at both ends of each axis."""
    if x.target not in (aten.pad.default, aten.constant_pad_nd.default) or len(x.users) > 1:
        return x, own
    given: dict[str, Any] = arguments(x)
    amounts = list(given["pad"])
    plain = given.get("mode", "constant") == "constant" and not given.get("value")
    if not plain or len(amounts) > 2 * len(own) or not all(isinstance(a, int) for a in amounts):
        return x, own
    amounts += [0] * (2 * len(own) - len(amounts))
    ends = [(amounts[2 * n], amounts[2 * n + 1]) for n in reversed(range(len(own)))]
    both = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(own, ends, strict=True)]
    return given["self"], both


def _with_slices(node: fx.Node, rank: int) -> tuple[fx.Node, list[tuple[int, int]]]:
    """The last of the slices behind a shuffle, and what they cut off each axis."""
    cuts = [(0, 0)] * rank
    while len(_readers(node)) == 1:
        (user,) = _readers(node)
        if user.target is not aten.slice.Tensor:
            break
        given = arguments(user)
        axis = int(given["dim"]) % node.meta["val"].dim() - 2
        start, end = given["start"] or 0, END if given["end"] is None else given["end"]
        plain = isinstance(start, int) and isinstance(end, int) and given["step"] == 1
        if axis < 0 or not plain or start < 0 or 0 <= end < END:
            break
        cuts[axis] = (cuts[axis][0] + start, cuts[axis][1] + (0 if end == END else -end))
        node = user
    return node, cuts


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * axes if len(values) == 1 else values)]
