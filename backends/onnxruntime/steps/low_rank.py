"""low_rank: a corrected weight W + B A becomes the layer on W and two small products beside it.

The runtime's kernels for compressed weights take no correction, and its constant folding would
turn the sum into a dense float weight. A weight that is stored dense takes its correction in.

Layers that read the same input through the same A share x A^T. Where A sums blocks of the inputs,
as the minima of blocks need it, it is a sum and no product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import is_call, size
from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import KINDS, TABLE

aten = torch.ops.aten
ours = torch.ops.graphwright


Shared = dict[tuple[fx.Node, str | fx.Node], fx.Node]
"""x A^T by x and A."""


def split_low_rank(editor: Editor) -> int:
    """Takes every correction out of its weight; returns how many."""
    count = 0
    shared: Shared = {}
    for node in list(editor.graph.find_nodes(op="call_function", target=ours.add_low_rank.default)):
        base = node.args[0]
        if base.op == "get_attr":
            count += _merge(editor, node)
        else:
            count += all([_beside(editor, use, shared) for use in _uses(node)])
    return count


def _merge(editor: Editor, node: fx.Node) -> int:
    weight, b, a = (editor.tensor(arg) for arg in node.args)
    if weight is None or b is None or a is None:
        return 0
    merged = ours.add_low_rank(weight.detach(), b.detach(), a.detach())
    stored = node.args[0]
    assert isinstance(stored, fx.Node)
    name = editor.add_state(f"{stored.target}_corrected", merged)
    editor.replace(node, editor.get(name))
    return 1


def _uses(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(layer, its weight node) of every layer that reads a corrected weight."""
    found = []
    for user in node.users:
        moved = is_call(user, aten.transpose.int, aten.reshape.default)
        found += [(reader, user) for reader in user.users] if moved else [(user, node)]
    return found


def _beside(editor: Editor, use: tuple[fx.Node, fx.Node], shared: Shared) -> bool:
    layer, weight = use
    kind = TABLE.get(KINDS.get(layer.target, ""))
    if kind is None or not (kind.is_product or is_call(layer, aten.embedding.default)):
        return False
    place = kind.weight
    if layer.kwargs or len(layer.args) <= place or layer.args[place] is not weight:
        return False
    corrected = weight if is_call(weight, ours.add_low_rank.default) else weight.args[0]
    assert isinstance(corrected, fx.Node)
    base, b, a = corrected.args
    x = layer.args[kind.input]
    extra: fx.Node | None
    if is_call(layer, aten.embedding.default):
        rows = editor.call(aten.embedding.default, b, x, before=layer)
        extra = editor.call(aten.matmul.default, rows, a, before=layer)
    elif kind.spatial:
        extra = _convolution(editor, layer, weight, x, b, a)
    elif kind.experts is not None:
        ids, op = layer.args[kind.experts], ours.expert_linear.default
        small = editor.call(op, x, a, ids, None, before=layer)
        extra = editor.call(op, small, b, ids, None, before=layer)
    else:
        small = _small(editor, x, a, shared)
        extra = editor.call(aten.linear.default, small, b, before=layer)
    if extra is None:
        return False
    plain: Any = base
    if weight is not corrected:
        plain = editor.call(weight.target, base, *weight.args[1:], before=weight, like=weight)
    layer.replace_input_with(weight, plain)
    following = layer.next
    total = editor.call(aten.add.Tensor, layer, extra, before=following, like=layer)
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    return True


def _small(editor: Editor, x: Any, a: Any, shared: Shared) -> fx.Node:
    """x A^T, made once, behind x and A."""
    key = (x, str(a.target) if a.op == "get_attr" else a)
    if key in shared:
        return shared[key]
    place = (x if a < x else a).next
    while place.op in ("placeholder", "get_attr"):
        place = place.next
    matrix = editor.tensor(a)
    block = 0 if matrix is None else summed_block(matrix)
    if matrix is not None and block:
        leading = [size(editor, x, axis, place) for axis in range(len(sizes_of(x)) - 1)]
        shape = [*leading, matrix.shape[0], block]
        cut = editor.call(aten.reshape.default, x, shape, before=place)
        small = editor.call(aten.sum.dim_IntList, cut, [-1], before=place)
    else:
        small = editor.call(aten.linear.default, x, a, before=place)
    shared[key] = small
    return small


def summed_block(matrix: torch.Tensor) -> int:
    """Columns that every row of a matrix of ones and zeros sums, side by side; 0 for any other."""
    blocks, columns = matrix.shape
    if not blocks or columns % blocks or int((matrix != 0).sum()) != columns:
        return 0
    block = int(columns // blocks)
    rows = torch.arange(columns, device=matrix.device) // block
    ones = matrix[rows, torch.arange(columns, device=matrix.device)]
    return block if bool((ones == 1).all()) else 0


def _convolution(
    editor: Editor, layer: fx.Node, weight: fx.Node, x: Any, b: Any, a: Any
) -> fx.Node | None:
    """The same windows with A for their kernel, and a convolution of size 1 with B."""
    groups = layer.args[6] if len(layer.args) > 6 else 1
    if groups != 1:
        return None
    shape = [int(size) for size in weight.meta["val"].shape]
    rank = int(b.meta["val"].shape[1])
    kernel = editor.call(aten.reshape.default, a, [rank, *shape[1:]], before=layer)
    ones = [1] * len(shape[2:])
    point = editor.call(aten.reshape.default, b, [shape[0], rank, *ones], before=layer)
    small = editor.call(layer.target, x, kernel, None, *layer.args[3:], before=layer)
    return editor.call(layer.target, small, point, before=layer)
