"""cached_attention: attention over a cache of keys and values to com.microsoft GroupQueryAttention.

The kernel appends a step's keys and values to the cache itself, in place where past and present are
one buffer, and reads the keys of each row up to that row's own length. So it takes the program's
mask in another form: the number of tokens in every row. Rows are then padded on the right, and
their tokens lie side by side in the cache.

All attentions of a program are replaced or none: one that still joined its cache would see a row's
pads between its tokens.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.attention import merge_heads, put_merged
from graphwright.backends.onnxruntime.steps.graph import (
    insert,
    is_call,
    is_float32,
    onnx_call,
    onnx_calls,
    size,
)
from graphwright.backends.onnxruntime.steps.layout import COPIES, EXPANDS, RESHAPES
from graphwright.backends.onnxruntime.steps.rotary_inside import Rotary, rotated
from graphwright.ir.edit import Editor
from graphwright.ir.generation.record import FACT, Generation
from graphwright.ir.graph.cached import SDPA, CachedAttention, NotCached, cached_attention_at
from graphwright.ir.graph.sizes import dimension_names
from graphwright.ir.ops.attention import attention as attention_op

aten = torch.ops.aten

CACHE_FACT = "lower.cache"
"""Fact of a program whose attentions append to the cache themselves; where positions go in."""

KEPT_FACT = "lower.cached_attention.left"
"""Fact: attention that stays as it is -> why."""


ATTENTION = (SDPA, attention_op)


class Unfit(Exception):
    """An attention that the kernel does not compute."""


def fuse_cached_attention(editor: Editor) -> int:
    """Replaces every attention over the cache, where the kernel computes all of them."""
    record = Generation.of_decoder(editor.program)
    if record is None or not record.layers or record.mask is None or record.states:
        return 0
    found, left = find_cached(editor, record)
    if left or not found:
        editor.facts[KEPT_FACT] = left
        editor.changed = True
        return 0
    lengths = _lengths(editor, record, found[0].node)
    inside = rotated(editor, record, [(c.query, c.keys.new) for c in found])
    for place, cached in enumerate(found):
        _fuse(editor, cached, lengths, None if inside is None else inside[place])
    editor.facts[CACHE_FACT] = {"rotary": "outside" if inside is None else "inside"}
    editor.facts[FACT] = {**editor.facts[FACT], "padding": "right"}
    return len(found)


def find_cached(editor: Editor, record: Generation) -> tuple[list[CachedAttention], dict[str, str]]:
    """The attentions over the cache, and why others that read it have no form in the kernel."""
    inputs = {str(n.target): n for n in editor.graph.find_nodes(op="placeholder")}
    names, forms = dimension_names(editor.program), dict[Any, Any]()
    found: list[CachedAttention] = []
    left: dict[str, str] = {}
    for place, layer in enumerate(record.layers):
        try:
            node = _reader(inputs[layer.past_key], inputs[layer.past_value])
            cached = cached_attention_at(node, editor.state, names, forms)
            if (cached.keys.past, cached.values.past) != (
                inputs[layer.past_key],
                inputs[layer.past_value],
            ):
                raise Unfit(f"{node.name} reads keys and values of different layers")
            _refuse_unfit(cached, record)
            found.append(cached)
        except (NotCached, Unfit) as why:
            left[f"layer {place}"] = str(why)
    return found, left


def _refuse_unfit(cached: CachedAttention, record: Generation) -> None:
    """Raises Unfit where the kernel does not take an attention over a cache."""
    parts = (cached.query, cached.keys.new, cached.values.new)
    if not all(is_float32(x) and x.meta["val"].dim() == 4 for x in parts):
        raise Unfit("the kernel takes float32 tensors (batch, heads, length, width)")
    (width, key_width, value_width) = (sizes_of(x)[3] for x in parts)
    if not all(isinstance(s, int) for s in (width, key_width, value_width)):
        raise Unfit("its heads have no fixed width")
    if not width == key_width == value_width:
        raise Unfit(
            f"its keys have width {key_width}, its values {value_width}: the kernel wants one"
        )
    if width % 8:
        raise Unfit(f"the kernel wants a head width that is a multiple of 8, and it is {width}")
    if cached.mask is None or cached.mask.target != record.mask:
        raise Unfit(f"its mask does not read {record.mask!r} for every key")


def _reader(*pasts: fx.Node) -> fx.Node:
    """The one attention that reads some pasts, each joined with this step's part."""
    readers: list[fx.Node] = []
    for past in pasts:
        joins = [user for user in past.users if not is_call(user, aten.sym_size.int)]
        if len(joins) != 1 or not is_call(joins[0], aten.cat.default):
            raise Unfit(f"{past.name} is read by more than the join with this step's")
        ends = _ends(joins[0])
        if len(ends) != 1 or not is_call(next(iter(ends)), *ATTENTION):
            kinds = sorted({str(end.target) for end in ends})
            raise Unfit(
                f"{joins[0].name} is read by {', '.join(kinds) or 'nothing'}, not by one attention"
            )
        readers += ends
    if readers[0] is not readers[-1]:
        raise Unfit(f"{' and '.join(past.name for past in pasts)} belong to two attentions")
    return readers[0]


def _ends(join: fx.Node) -> set[fx.Node]:
    """What computes with a join, behind copies and repetitions."""
    found: set[fx.Node] = set()
    stack = [join]
    copies = (*COPIES, *EXPANDS, *RESHAPES, aten.repeat_interleave.self_int, aten.slice.Tensor)
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or is_call(user, aten.sym_size.int):
                continue
            if is_call(user, *copies):
                stack.append(user)
            else:
                found.add(user)
    return found


def _lengths(editor: Editor, record: Generation, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Places of the last token of every row, int32 (batch,), and the longest row, int32 ()."""
    mask = next(n for n in editor.graph.find_nodes(op="placeholder") if n.target == record.mask)
    first = next(n for n in editor.graph.nodes if n.op not in ("placeholder", "get_attr"))
    counts = editor.call(aten.sum.dim_IntList, mask, [1], before=first)
    last = editor.call(aten.sub.Scalar, counts, 1, before=first)
    last = editor.call(aten.to.dtype, last, torch.int32, before=first)
    total = onnx_call(
        editor, "Shape", [mask], [1], before=first, domain="", dtype=torch.int64, start=1, end=2
    )
    total = editor.call(aten.to.dtype, total, torch.int32, before=first)
    return last, editor.call(aten.squeeze.dim, total, 0, before=first)


def _fuse(
    editor: Editor, cached: CachedAttention, lengths: tuple[fx.Node, fx.Node], rotary: Rotary | None
) -> None:
    node = cached.node
    heads, width = sizes_of(cached.query)[1], sizes_of(cached.query)[3]
    groups = sizes_of(cached.keys.new)[1]
    batch, length = size(editor, cached.query, 0, node), size(editor, cached.query, 2, node)
    sources = (cached.query, cached.keys.new) if rotary is None else (rotary.query, rotary.key)
    query, key, value = (
        x if x.meta["val"].dim() == 3 else merge_heads(editor, x, node)
        for x in (*sources, cached.values.new)
    )
    total = size(editor, cached.keys.joined, 2, node)
    past = (batch, groups, total, width)
    stand_in = cached.query.meta["val"]
    stand_in = stand_in.transpose(1, 2).flatten(2)
    tables = (None, None) if rotary is None else rotary.tables
    pasts = (cached.keys.past, cached.values.past)
    made = onnx_calls(
        editor, "GroupQueryAttention",
        [query, key, value, *pasts, *lengths, *tables, None, None, cached.sinks],
        [(batch, length, heads * width), past, past], before=node,
        values=[stand_in, cached.keys.joined.meta["val"], cached.values.joined.meta["val"]],
        num_heads=heads, kv_num_heads=groups, scale=cached.scale,
        local_window_size=cached.window, do_rotary=1 if rotary else None,
        softcap=cached.softcap or None,
    )  # fmt: skip
    result, keys, values = (
        insert(editor, operator.getitem, made, place, before=node, value=value)
        for place, value in enumerate(made.meta["val"])
    )
    output = editor.graph.output_node()
    output.replace_input_with(cached.keys.joined, keys)
    output.replace_input_with(cached.values.joined, values)
    put_merged(editor, node, result, batch, length, heads, width)
