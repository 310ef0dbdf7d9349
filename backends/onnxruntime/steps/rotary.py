"""rotary: x cos + rotate_half(x) sin, written out, to com.microsoft RotaryEmbedding.

Source: Su et al. 2021, "RoFormer", in the half-rotating form of GPT-NeoX and Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
    is_call,
    is_float32,
    onnx_call,
    size,
)
from graphwright.backends.onnxruntime.steps.layout import (
    CASTS,
    EXPANDS,
    RESHAPES,
    TRANSPOSES,
    order_of,
)
from graphwright.ir.edit import Editor

aten = torch.ops.aten
END = 2**63 - 1
Tables = dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node, fx.Node]]


def fuse_rotary(editor: Editor) -> int:
    """Replaces every rotation whose cos and sin repeat over the two halves of the width."""
    tables: Tables = {}
    count = 0
    for node in list(editor.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        found = _parts(node)
        if found is not None:
            count += _fuse(editor, node, *found, tables)
    return count


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) of x * cos + rotate_half(x) * sin."""
    if node.kwargs or not is_float32(node) or node.meta["val"].dim() != 4:
        return None
    for straight, turned in (node.args[:2], node.args[1::-1]):
        if not (is_call(straight, aten.mul.Tensor) and is_call(turned, aten.mul.Tensor)):
            continue
        assert isinstance(straight, fx.Node)
        assert isinstance(turned, fx.Node)
        for x, cos in (straight.args[:2], straight.args[1::-1]):
            for half, sin in (turned.args[:2], turned.args[1::-1]):
                if _is_half_rotation(half, x) and _is_table(cos, x) and _is_table(sin, x):  # type: ignore[arg-type]
                    return x, cos, sin  # type: ignore[return-value]
    return None


def _is_half_rotation(node: Any, x: Any) -> bool:
    """cat([-x[..., d/2:], x[..., :d/2]], -1)"""
    if not is_call(node, aten.cat.default) or not isinstance(x, fx.Node):
        return False
    parts, rank, width = node.args[0], x.meta["val"].dim(), sizes_of(x)[-1]
    if argument(node, 1, "dim", 0) not in (-1, rank - 1) or len(parts) != 2:
        return False
    negated, first = parts
    if not is_call(negated, aten.neg.default) or not isinstance(width, int) or width % 2:
        return False
    return _is_slice(negated.args[0], x, width // 2, width) and _is_slice(first, x, 0, width // 2)


def _is_slice(node: Any, x: fx.Node, start: int, end: int) -> bool:
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x:
        return False
    rank, width = x.meta["val"].dim(), sizes_of(x)[-1]
    stop = argument(node, 3, "end")
    stop = width if stop is None else stop
    return (
        argument(node, 1, "dim", 0) in (-1, rank - 1)
        and argument(node, 2, "start", 0)
        in ((start, None) if start == 0 else (start, start - width))
        and isinstance(stop, int)
        and min(stop, width) % width == end % width
        and argument(node, 4, "step", 1) == 1
    )


def _is_table(node: Any, x: fx.Node) -> bool:
    """(batch or 1, 1, length, width), equal for all heads, its second half a copy of the first."""
    if not is_float32(node) or node.meta["val"].dim() != 4:
        return False
    table, of = sizes_of(node), sizes_of(x)
    if table[1:] != [1, *of[2:]] or table[0] not in (1, of[0]):
        return False
    return _repeats(node)


def _repeats(node: Any) -> bool:
    """Whether the last axis is provably some tensor joined to itself."""
    if is_call(node, aten.cat.default):
        parts = node.args[0]
        rank = node.meta["val"].dim()
        is_last = argument(node, 1, "dim", 0) in (-1, rank - 1)
        return is_last and len(parts) == 2 and parts[0] is parts[1]
    if is_call(node, aten.mul.Tensor) and isinstance(node.args[1], float | int):
        return _repeats(node.args[0])
    same = (aten.cos.default, aten.sin.default, aten.mul.Scalar, *CASTS)
    if is_call(node, *same):
        return _repeats(node.args[0])
    if is_call(node, *RESHAPES, *EXPANDS):
        # Only where the last axis is left alone.
        source = node.args[0]
        return sizes_of(source)[-1:] == sizes_of(node)[-1:] and _repeats(source)
    return False


def _fuse(
    editor: Editor, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, tables: Tables
) -> int:
    if (cos, sin) not in tables:
        tables[cos, sin] = _caches(editor, node, cos, sin)
    caches = tables[cos, sin]
    heads, length = sizes_of(x)[1], size(editor, x, 2, node)
    batch, width = size(editor, x, 0, node), int(sizes_of(x)[3])
    source: Any = x.args[0] if is_call(x, *TRANSPOSES) and order_of(x) == [0, 2, 1, 3] else None
    if isinstance(heads, int) and is_call(source, *RESHAPES):
        # Split heads that were just swapped: rotate the tensor they were split from.
        whole = source.args[0]
        if sizes_of(whole) == [*sizes_of(source)[:2], heads * width]:
            turned = onnx_call(
                editor, "RotaryEmbedding", [whole, *caches], (batch, length, heads * width),
                before=node, value=whole.meta["val"],
            )  # fmt: skip
            split = [batch, length, heads, width]
            parted = editor.call(aten.reshape.default, turned, split, before=node)
            editor.replace(node, editor.call(aten.transpose.int, parted, 1, 2, before=node))
            return 1
    shape = (batch, size(editor, x, 1, node), length, width)
    turned = onnx_call(
        editor, "RotaryEmbedding", [x, *caches], shape, before=node, value=node.meta["val"]
    )
    editor.replace(node, turned)
    return 1


def _caches(
    editor: Editor, before: fx.Node, cos: fx.Node, sin: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Positions, and the tables of cos and sin by position: (positions, width / 2)."""
    width = int(sizes_of(cos)[3])
    batch, length = size(editor, cos, 0, before), size(editor, cos, 2, before)
    halves = []
    for table in (cos, sin):
        half = editor.call(aten.slice.Tensor, table, 3, 0, width // 2, before=before)
        halves.append(editor.call(aten.reshape.default, half, [-1, width // 2], before=before))
    if batch == 1:
        # One number is the position of the first token of every sequence.
        kind = {"dtype": torch.int64, "device": torch.device("cpu")}
        start = editor.call(aten.full.default, [1], 0, before=before, **kind)  # type: ignore[arg-type]
        return start, halves[0], halves[1]
    rows = editor.call(aten.sym_size.int, halves[0], 0, before=before)
    places = editor.call(
        aten.arange.default, rows, dtype=torch.int64, device=torch.device("cpu"), before=before
    )
    places = editor.call(aten.reshape.default, places, [batch, length], before=before)
    return places, halves[0], halves[1]
