"""Norm steps: RMS norm spelled out, and residual additions into the norm that follows them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
    insert,
    is_call,
    is_float32,
    onnx_calls,
    size,
)
from graphwright.ir.edit import Editor

aten = torch.ops.aten
MULTIPLY = (aten.mul.Tensor,)


def find_rms_norm(editor: Editor) -> int:
    """x * rsqrt(mean(x^2, -1) + eps) * weight, written out, becomes one `aten.rms_norm`."""
    count = 0
    for root in editor.graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        count += sum(_rms_norm(editor, user, root) for user in list(root.users))
    return count


def _rms_norm(editor: Editor, product: fx.Node, root: fx.Node) -> int:
    if not is_call(product, *MULTIPLY) or not is_float32(product):
        return 0
    x = product.args[0] if product.args[1] is root else product.args[1]
    eps = _mean_square_of(root, x)
    if eps is None or not isinstance(x, fx.Node):
        return 0
    width = sizes_of(x)[-1]
    if not isinstance(width, int):
        return 0
    weighted = next(iter(product.users)) if len(product.users) == 1 else None
    weight = _weight_of(weighted, product, width)
    last = weighted if weight is not None and weighted is not None else product
    norm = editor.call(aten.rms_norm.default, x, [width], weight, eps, before=last)
    editor.replace(last, norm)
    return 1


def _mean_square_of(root: fx.Node, x: Any) -> float | None:
    """eps when `root` is rsqrt(mean(x^2, -1, keepdim) + eps)."""
    shifted = root.args[0]
    if not is_call(shifted, aten.add.Tensor, aten.add.Scalar):
        return None
    assert isinstance(shifted, fx.Node)
    mean, eps = shifted.args[:2]
    if not isinstance(eps, float | int) or not is_call(mean, aten.mean.dim):
        return None
    assert isinstance(mean, fx.Node)
    rank = x.meta["val"].dim() if isinstance(x, fx.Node) else 0
    dims = mean.args[1]
    if not argument(mean, 2, "keepdim", False) or [d % rank for d in dims] != [rank - 1]:  # type: ignore[union-attr, operator]
        return None
    square = mean.args[0]
    if is_call(square, aten.pow.Tensor_Scalar) and square.args == (x, 2):  # type: ignore[union-attr]
        return float(eps)
    if is_call(square, aten.mul.Tensor) and square.args == (x, x):  # type: ignore[union-attr]
        return float(eps)
    if is_call(square, aten.square.default) and square.args == (x,):  # type: ignore[union-attr]
        return float(eps)
    return None


def _weight_of(node: fx.Node | None, product: fx.Node, width: int) -> fx.Node | None:
    if node is None or not is_call(node, *MULTIPLY):
        return None
    weight = node.args[0] if node.args[1] is product else node.args[1]
    if not isinstance(weight, fx.Node) or not isinstance(weight.meta.get("val"), torch.Tensor):
        return None
    is_weight = sizes_of(weight) == [width] and is_float32(weight)
    # What computes the weight must stand before the place where the norm goes.
    return weight if is_weight else None


def fuse_skip_norm(editor: Editor) -> int:
    """norm(a + b) becomes SkipLayerNormalization / SkipSimplifiedLayerNormalization."""
    norms = [
        node for node in editor.graph.nodes
        if is_call(node, aten.layer_norm.default, aten.rms_norm.default)
    ]  # fmt: skip
    return sum(_skip_norm(editor, node) for node in norms)


def _skip_norm(editor: Editor, node: fx.Node) -> int:
    total, weight = node.args[0], argument(node, 2, "weight")
    if not is_call(total, aten.add.Tensor) or not is_float32(node) or weight is None:
        return 0
    assert isinstance(total, fx.Node)
    a, b = total.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or total.kwargs:
        return 0
    shape = sizes_of(total)
    if len(node.args[1]) != 1 or len(shape) not in (2, 3) or not (is_float32(a) and is_float32(b)):  # type: ignore[arg-type]
        return 0
    if sizes_of(a) != shape or sizes_of(b) != shape or not _comes_before(total, weight):
        return 0
    is_layer = node.target is aten.layer_norm.default
    bias = argument(node, 3, "bias") if is_layer else None
    eps = argument(node, 4 if is_layer else 3, "eps", 1e-5 if is_layer else None)
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    kind = "SkipLayerNormalization" if is_layer else "SkipSimplifiedLayerNormalization"
    full = [size(editor, a, axis, node) for axis in range(len(shape))]
    stats = [*full[:-1], 1]
    inputs = [a, b, weight, *([bias] if is_layer else [])]
    only = all(user is node for user in total.users)
    count = 1 if only else 4
    whole = node.meta["val"]
    values = [whole, *([whole[..., :1]] * 2 if count > 1 else []), whole][:count]
    fused = onnx_calls(
        editor, kind, inputs, [full, stats, stats, full][:count], before=node, values=values,
        epsilon=eps,
    )  # fmt: skip
    editor.replace(node, insert(editor, operator.getitem, fused, 0, before=node, value=whole))
    if not only:
        _share_sum(editor, total, fused)
    return 1


def _share_sum(editor: Editor, total: fx.Node, fused: fx.Node) -> None:
    """Later readers of the sum take it from the fused op."""
    order = {node: index for index, node in enumerate(editor.graph.nodes)}
    readers = [user for user in total.users if order[user] > order[fused]]
    if len(readers) != len(total.users):
        return
    after = fused.next
    value = total.meta["val"]
    total_again = insert(editor, operator.getitem, fused, 3, before=after, value=value)
    total.replace_all_uses_with(total_again)
    editor.graph.erase_node(total)


def _comes_before(node: fx.Node, other: Any) -> bool:
    return isinstance(other, fx.Node) and (other.op == "get_attr" or other < node)
