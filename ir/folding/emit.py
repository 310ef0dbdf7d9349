"""Puts a `Convolved` into a graph as one convolution or one linear layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.folding.convolved import Convolved, NotFoldable

aten = torch.ops.aten

OPERATORS = {0: aten.linear.default, **{n: getattr(aten, f"conv{n}d").default for n in (1, 2, 3)}}
"""By the number of spatial axes."""


def emit(
    editor: Editor,
    start: fx.Node,
    end: fx.Node,
    made: Convolved,
    name: str,
    replaced: Collection[fx.Node] = (),
) -> fx.Node:
    """Lets everything that read `end` read one layer of `start`.

    Args:
        editor: changed.
        start, end: of the stretch.
        made: the stretch's map.
        name: of the layer: its weight is stored under `name.weight`, or a free name like it.
        replaced: nodes that nothing will read any more; the names of their tensors are free.

    Raises:
        NotFoldable: the layer would need weights of another dtype than its input's.
    """
    dtype = start.meta["val"].dtype
    if dtype != end.meta["val"].dtype:
        raise NotFoldable("changes the dtype on the way")
    kernel, padding, dilation = _laid_out(made)
    weight = _store(editor, f"{name}.weight", kernel, start, replaced)
    bias = None
    if bool((made.bias != 0).any()):
        bias = _store(editor, f"{name}.bias", made.bias, start, replaced)
    if not made.axes:
        new = editor.call(aten.linear.default, start, weight, bias, before=end, like=end)
    else:
        both = [min(ends) for ends in padding]
        symmetric = all(low == high for low, high in padding) and min(both) >= 0
        x = start
        if not symmetric:
            amounts = [n for ends in reversed(padding) for n in ends]
            x = editor.call(aten.pad.default, start, amounts, before=end, like=end)
        new = editor.call(
            OPERATORS[made.axes], x, weight, bias, list(made.stride),
            both if symmetric else [0] * made.axes, list(dilation), made.groups,
            before=end, like=end,
        )  # fmt: skip
    editor.replace(end, new)
    return new


def owner(editor: Editor, layers: Sequence[fx.Node]) -> str:
    """A name for what stands for several layers: the module that holds them all."""
    names = [str(w.target).rpartition(".")[0].split(".") for w in map(_weight, layers) if w]
    if not names:
        return layers[0].name if layers else "folded"
    common: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or ".".join(names[0])


def _weight(layer: fx.Node) -> fx.Node | None:
    weight = layer.args[1] if len(layer.args) > 1 else None
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _laid_out(made: Convolved) -> tuple[Tensor, list[tuple[int, int]], list[int]]:
    """(kernel with evenly spaced taps, padding at both ends of each axis, dilation)."""
    kernel, padding, dilation = made.kernel, [], []
    for axis, offsets in enumerate(made.offsets):
        steps = [b - a for a, b in itertools.pairwise(offsets)]
        step = math.gcd(*steps) if steps else 1
        count = (offsets[-1] - offsets[0]) // step + 1
        if count != len(offsets):
            wide = kernel.new_zeros(*kernel.shape[: 2 + axis], count, *kernel.shape[3 + axis :])
            places = torch.tensor([(o - offsets[0]) // step for o in offsets])
            kernel = wide.index_copy(2 + axis, places, kernel)
        span = offsets[-1] - offsets[0]
        padding.append((-offsets[0], made.reach[axis] + 1 + span + offsets[0]))
        dilation.append(step)
    return kernel, padding, dilation


def _store(
    editor: Editor, name: str, value: Tensor, like: fx.Node, replaced: Collection[fx.Node]
) -> fx.Node:
    given: Any = like.meta["val"]
    stored = next(iter(editor.state.values()), None)
    device = stored.device if stored is not None else given.device
    made = nn.Parameter(value.to(dtype=given.dtype, device=device).contiguous())
    if name in editor.state and all(user in replaced for user in editor.uses(name)):
        editor.set_state(name, made)
        return editor.get(name)
    return editor.get(editor.add_state(name, made))
