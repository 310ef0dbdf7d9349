"""find_attention: softmax(q k^T scale + mask) v, written out, to one attention call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import argument, is_call, is_float32
from graphwright.backends.onnxruntime.steps.layout import TRANSPOSES, order_of
from graphwright.ir.edit import Editor

aten = torch.ops.aten


def find_attention(editor: Editor) -> int:
    """Replaces spelled-out attention over (batch, heads, length, width) by ATen's own call."""
    count = 0
    for softmax in list(editor.graph.find_nodes(op="call_function", target=aten.softmax.int)):
        count += _find(editor, softmax)
    return count


def _find(editor: Editor, softmax: fx.Node) -> int:
    if not is_float32(softmax) or softmax.meta["val"].dim() != 4 or len(softmax.users) != 1:
        return 0
    product = next(iter(softmax.users))
    if not is_call(product, aten.matmul.default) or product.args[0] is not softmax:
        return 0
    if argument(softmax, 1, "dim") not in (-1, 3):
        return 0
    masks: list[fx.Node] = []
    scores = _peel_masks(softmax.args[0], masks)
    scores, scale = _peel_scale(scores)
    if not is_call(scores, aten.matmul.default) or not is_float32(scores):
        return 0
    assert isinstance(scores, fx.Node)
    q, turned = scores.args[:2]
    if not is_call(turned, *TRANSPOSES) or order_of(turned) != [0, 1, 3, 2]:  # type: ignore[arg-type]
        return 0
    k, v = turned.args[0], product.args[1]  # type: ignore[union-attr]
    if not all(isinstance(x, fx.Node) and x.meta["val"].dim() == 4 for x in (q, k, v)):
        return 0
    if sizes_of(softmax) != sizes_of(scores) or not _same_lead(q, k, v):
        return 0
    mask = _sum(editor, masks, product) if masks else None
    attention = editor.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, before=product, scale=scale
    )
    editor.replace(product, attention)
    return 1


def _only_reader(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _peel_masks(node: Any, masks: list[fx.Node]) -> Any:
    """Takes float terms off the scores, outermost first."""
    while is_call(node, aten.add.Tensor) and not node.kwargs and _only_reader(node):
        a, b = node.args[:2]
        inner, term = (a, b) if _leads_to_product(a) else (b, a)
        if not (_leads_to_product(inner) and is_float32(term) and is_float32(inner)):
            return node
        if sizes_of(inner) != sizes_of(node):
            return node
        masks.append(term)
        node = inner
    return node


def _leads_to_product(node: Any) -> bool:
    """Whether this side of an addition is the scores: a product, scaled or with terms added."""
    for _ in range(6):
        if is_call(node, aten.matmul.default):
            return _only_reader(node)
        if not is_call(node, aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
                       aten.div.Scalar):  # fmt: skip
            return False
        node = node.args[0]
    return False


def _peel_scale(node: Any) -> tuple[Any, float]:
    scale = 1.0
    while is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        number = node.args[1]
        if not isinstance(number, float | int) or not _only_reader(node) or not number:
            return node, scale
        is_product = node.target in (aten.mul.Tensor, aten.mul.Scalar)
        scale *= number if is_product else 1 / number
        node = node.args[0]
    usable = math.isfinite(scale) and _only_reader(node)
    return (node if usable else None), scale


def _same_lead(q: Any, k: Any, v: Any) -> bool:
    return sizes_of(q)[:2] == sizes_of(k)[:2] == sizes_of(v)[:2]


def _sum(editor: Editor, masks: list[fx.Node], before: fx.Node) -> fx.Node:
    total = masks[-1]
    for term in reversed(masks[:-1]):
        total = editor.call(aten.add.Tensor, total, term, before=before)
    return total
