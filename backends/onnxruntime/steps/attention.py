"""attention: scaled_dot_product_attention to com.microsoft MultiHeadAttention.

Queries, keys and values stay products of their own (the packed `Attention` op would keep one
fp32 weight that later quantization cannot reach).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
    insert,
    is_call,
    is_float32,
    onnx_call,
    size,
)
from graphwright.backends.onnxruntime.steps.layout import RESHAPES, TRANSPOSES, order_of
from graphwright.ir.edit import Editor
from graphwright.ir.graph.mask_form import mask_form
from graphwright.ir.graph.masks import K, Q, conjunction

aten = torch.ops.aten
CLOSED = torch.finfo(torch.float32).min
"""Added to the score of a key that may not be seen: exp of it is 0 beside any real score."""


@dataclass(frozen=True)
class Visibility:
    """The keys that each query sees, as operands of the kernel.

    Attributes:
        causal: the kernel's own causal mode.
        keys: int32 (batch, keys), 0 where no query may look.
        bias: float (batch or 1, heads or 1, queries, keys) added to the scores.
        seen: float (batch, queries or 1, 1), 0 for queries that see no key at all: torch gives
            zeros there, a softmax over equal scores the mean. None when there are none.
    """

    causal: bool = False
    keys: fx.Node | None = None
    bias: fx.Node | None = None
    seen: fx.Node | None = None


def fuse_attention(editor: Editor) -> int:
    """Replaces every attention whose form and mask the kernel computes exactly."""
    masks: dict[Any, Visibility | None] = {}
    count = 0
    for node in editor.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        count += _fuse(editor, node, masks)
    return count


def _fuse(editor: Editor, node: fx.Node, masks: dict[Any, Visibility | None]) -> int:
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    if not _fits(node, q, k, v):
        return 0
    visible = _visibility(editor, node, q, k, masks)
    if visible is None:
        return 0
    heads, width = int(q.meta["val"].shape[1]), int(v.meta["val"].shape[3])
    batch, length = size(editor, q, 0, node), size(editor, q, 2, node)
    k, v = (_repeat_heads(editor, x, heads, node) for x in (k, v))
    scale = argument(node, 6, "scale")
    query, key, value = (merge_heads(editor, x, node) for x in (q, k, v))
    stand_in = query.meta["val"] if sizes_of(query)[2] == heads * width else None
    merged = onnx_call(
        editor, "MultiHeadAttention", [query, key, value, None, visible.keys, visible.bias],
        (batch, length, heads * width), before=node, value=stand_in, num_heads=heads,
        scale=float(scale) if scale is not None else float(q.meta["val"].shape[-1]) ** -0.5,
        unidirectional=1 if visible.causal else None,
        mask_filter_value=CLOSED if visible.keys is not None else None,
    )  # fmt: skip
    if visible.seen is not None:
        stand_in = merged.meta["val"]
        merged = insert(editor, aten.mul.Tensor, merged, visible.seen, before=node, value=stand_in)
    put_merged(editor, node, merged, batch, length, heads, width)
    return 1


def _fits(node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    if not all(is_float32(x) and x.meta["val"].dim() == 4 for x in (q, k, v)):
        return False
    if argument(node, 4, "dropout_p", 0.0):
        return False
    sizes_q, sizes_k, sizes_v = sizes_of(q), sizes_of(k), sizes_of(v)
    static = [sizes_q[1], sizes_k[1], sizes_q[3], sizes_v[3]]
    if not all(isinstance(s, int) and s > 0 for s in static):
        return False
    if sizes_q[0] != sizes_k[0] or sizes_k[:3] != sizes_v[:3] or sizes_q[3] != sizes_k[3]:
        return False
    return bool(sizes_q[1] % sizes_k[1] == 0)


def merge_heads(editor: Editor, x: fx.Node, before: fx.Node) -> fx.Node:
    """(batch, heads, length, width) to (batch, length, heads * width)."""
    heads, width = (int(x.meta["val"].shape[axis]) for axis in (1, 3))
    swapped = x.args[0] if _swaps_heads(x) else None
    if not isinstance(swapped, fx.Node):
        swapped = editor.call(aten.transpose.int, x, 1, 2, before=before)
    elif is_call(swapped, *RESHAPES):
        # Usually the heads were split from just this tensor.
        whole: Any = swapped.args[0]
        if sizes_of(whole) == [*sizes_of(swapped)[:2], heads * width]:
            return whole  # type: ignore[no-any-return]
    shape = [size(editor, x, 0, before), size(editor, x, 2, before), heads * width]
    return editor.call(aten.reshape.default, swapped, shape, before=before)


def _swaps_heads(node: Any) -> bool:
    return is_call(node, *TRANSPOSES) and order_of(node) == [0, 2, 1, 3]


def put_merged(
    editor: Editor, node: fx.Node, merged: fx.Node, batch: Any, length: Any, heads: int, width: int
) -> None:
    """Puts (batch, length, heads * width) where (batch, heads, length, width) was read."""
    for swapped in list(node.users):
        if not _swaps_heads(swapped):
            continue
        for whole in list(swapped.users):
            if is_call(whole, *RESHAPES) and sizes_of(whole) == sizes_of(merged):
                editor.replace(whole, merged)
        if not swapped.users:
            editor.erase(swapped)
    if not node.users:
        editor.erase(node)
        return
    split = editor.call(aten.reshape.default, merged, [batch, length, heads, width], before=node)
    editor.replace(node, editor.call(aten.transpose.int, split, 1, 2, before=node))


def _repeat_heads(editor: Editor, x: fx.Node, heads: int, before: fx.Node) -> fx.Node:
    groups, width = (int(x.meta["val"].shape[axis]) for axis in (1, 3))
    if groups == heads:
        return x
    batch, length = size(editor, x, 0, before), size(editor, x, 2, before)
    wide = editor.call(aten.unsqueeze.default, x, 2, before=before)
    shape = [batch, groups, heads // groups, length, width]
    tiled = editor.call(aten.expand.default, wide, shape, before=before)
    return editor.call(aten.reshape.default, tiled, [batch, heads, length, width], before=before)


# ---- masks


def _visibility(
    editor: Editor, node: fx.Node, q: fx.Node, k: fx.Node, masks: dict[Any, Visibility | None]
) -> Visibility | None:
    mask = argument(node, 3, "attn_mask")
    is_causal = bool(argument(node, 5, "is_causal", False))
    is_square = sizes_of(q)[2] == sizes_of(k)[2]
    if is_causal:
        return Visibility(causal=True) if mask is None and is_square else None
    if mask is None:
        return Visibility()
    lengths = sizes_of(q)[2:3] + sizes_of(k)[2:3]
    key = (mask, tuple(lengths))
    if key not in masks:
        masks[key] = _read_mask(editor, node, mask, q, k, is_square)
    return masks[key]


def _read_mask(
    editor: Editor, node: fx.Node, mask: fx.Node, q: fx.Node, k: fx.Node, is_square: bool
) -> Visibility | None:
    if mask.meta["val"].dtype == torch.float32:
        bias = _as_bias(editor, mask, node, q, k)
        return Visibility(bias=bias) if bias is not None else None
    if mask.meta["val"].dtype != torch.bool or mask.meta["val"].dim() > 4:
        return None
    form = mask_form(mask, editor.state)
    if form is not None and form.window is None and (is_square or not form.causal):
        if form.keys is None:
            return Visibility(causal=form.causal)
        if sizes_of(form.keys) == [sizes_of(q)[0], sizes_of(k)[2]]:
            return _padded(editor, form.keys, form.causal, node)
    return _masked(editor, node, mask, q, k, is_square)


def _padded(editor: Editor, keys: fx.Node, causal: bool, before: fx.Node) -> Visibility:
    """Key padding, alone or under a causal mask."""
    truth = keys
    if keys.meta["val"].dtype != torch.bool:
        truth = editor.call(aten.ne.Scalar, keys, 0, before=before)
    whole = editor.call(aten.to.dtype, truth, torch.int32, before=before)
    if causal:
        counts = editor.call(aten.to.dtype, truth, torch.float32, before=before)
        sums = editor.call(aten.cumsum.default, counts, 1, before=before)
        some = editor.call(aten.gt.Scalar, sums, 0.5, before=before)
        some = editor.call(aten.unsqueeze.default, some, 2, before=before)
    else:
        some = editor.call(aten.any.dim, truth, 1, True, before=before)
        some = editor.call(aten.unsqueeze.default, some, 2, before=before)
    seen = editor.call(aten.to.dtype, some, torch.float32, before=before)
    return Visibility(causal=causal, keys=whole, seen=seen)


def _masked(
    editor: Editor, node: fx.Node, mask: fx.Node, q: fx.Node, k: fx.Node, is_square: bool
) -> Visibility | None:
    """Any other boolean mask, as a bias of zeros and very negative numbers."""
    sizes = [1] * (4 - mask.meta["val"].dim()) + sizes_of(mask)
    always = is_square and _sees_itself(editor, mask)
    if not always and (sizes[1] != 1 or sizes[2] == 1):
        return None
    zero, closed = (
        editor.call(aten.full.default, [], number, dtype=torch.float32, before=node)
        for number in (0.0, CLOSED)
    )
    bias = editor.call(aten.where.self, mask, zero, closed, before=node)
    full = _as_bias(editor, bias, node, q, k)
    if full is None:
        return None
    if always:
        return Visibility(bias=full)
    some = editor.call(aten.any.dim, mask, -1, True, before=node)
    if mask.meta["val"].dim() == 4:
        some = editor.call(aten.squeeze.dim, some, 1, before=node)
    seen = editor.call(aten.to.dtype, some, torch.float32, before=node)
    return Visibility(bias=full, seen=seen)


def _sees_itself(editor: Editor, mask: fx.Node) -> bool:
    """Whether every query provably may see the key at its own place."""
    atoms = conjunction(mask, editor.state)
    if atoms is None:
        return False
    relations = [a for a in atoms if isinstance(a, sympy.core.relational.Relational)]
    return len(relations) == len(atoms) and all(a.subs(K, Q) == True for a in relations)  # noqa: E712


def _as_bias(
    editor: Editor, bias: fx.Node, before: fx.Node, q: fx.Node, k: fx.Node
) -> fx.Node | None:
    """A bias with all four axes, and the last two in full, as the kernel wants it."""
    sizes = [1] * (4 - bias.meta["val"].dim()) + sizes_of(bias)
    wanted_q, wanted_k = sizes_of(q), sizes_of(k)
    if len(sizes) != 4 or sizes[0] not in (1, wanted_q[0]) or sizes[1] not in (1, wanted_q[1]):
        return None
    for _ in range(4 - bias.meta["val"].dim()):
        bias = editor.call(aten.unsqueeze.default, bias, 0, before=before)
    if sizes[2:] == [wanted_q[2], wanted_k[2]]:
        return bias
    if sizes[2] not in (1, wanted_q[2]) or sizes[3] not in (1, wanted_k[2]):
        return None
    length, keys = size(editor, q, 2, before), size(editor, k, 2, before)
    return editor.call(aten.expand.default, bias, [-1, -1, length, keys], before=before)


def is_attention(node: Any) -> bool:
    """Whether a node is an attention that no step has replaced."""
    return is_call(node, aten.scaled_dot_product_attention.default)
