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
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.emitter import sizes_of
from graphwright.backends.onnxruntime.steps.attention import merge_heads, put_merged
from graphwright.backends.onnxruntime.steps.graph import (
    argument,
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
from graphwright.ir.graph.mask_form import MaskForm, mask_form
from graphwright.ir.ops.attention import attention as attention_op

aten = torch.ops.aten

CACHE_FACT = "lower.cache"
"""Fact of a program whose attentions append to the cache themselves; where positions go in."""

KEPT_FACT = "lower.cached_attention.left"
"""Fact: attention that stays as it is -> why."""


ATTENTION = (aten.scaled_dot_product_attention.default, attention_op)


class Unfit(Exception):
    """An attention that the kernel does not compute."""


@dataclass(frozen=True)
class Cached:
    """One attention over a cache.

    Attributes:
        node: the call.
        query, key, value: of this step, (batch, heads, length, width).
        keys, values: the joins of past and new.
        past: placeholders of keys and values.
        window: keys that a query sees, itself included; None when all.
        scale: of the scores.
        softcap: bound of the scores; 0 is none.
        sinks: (heads,) scores without a value; None where there are none.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    keys: fx.Node
    values: fx.Node
    past: tuple[fx.Node, fx.Node]
    window: int | None
    scale: float
    softcap: float
    sinks: fx.Node | None


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
    inside = rotated(editor, record, [(c.query, c.key) for c in found])
    for place, cached in enumerate(found):
        _fuse(editor, cached, lengths, None if inside is None else inside[place])
    editor.facts[CACHE_FACT] = {"rotary": "outside" if inside is None else "inside"}
    editor.facts[FACT] = {**editor.facts[FACT], "padding": "right"}
    return len(found)


def find_cached(editor: Editor, record: Generation) -> tuple[list[Cached], dict[str, str]]:
    """The attentions over the cache, and why others that read it have no form in the kernel."""
    inputs = {str(n.target): n for n in editor.graph.find_nodes(op="placeholder")}
    masks = _Masks(editor, record, [inputs[name] for name in record.past])
    found: list[Cached] = []
    left: dict[str, str] = {}
    for place, layer in enumerate(record.layers):
        past = (inputs[layer.past_key], inputs[layer.past_value])
        try:
            found.append(_read(past, masks))
        except Unfit as why:
            left[f"layer {place}"] = str(why)
    return found, left


def _read(past: tuple[fx.Node, fx.Node], masks: _Masks) -> Cached:
    keys, key = _joined(past[0])
    values, value = _joined(past[1])
    node = _attention(keys, values)
    query = node.args[0]
    assert isinstance(query, fx.Node)
    if not all(is_float32(x) and x.meta["val"].dim() == 4 for x in (query, key, value)):
        raise Unfit("the kernel takes float32 tensors (batch, heads, length, width)")
    heads, width = sizes_of(query)[1], sizes_of(query)[3]
    groups, key_width, value_width = sizes_of(key)[1], sizes_of(key)[3], sizes_of(value)[3]
    if not all(isinstance(s, int) for s in (heads, width, groups, key_width, value_width)):
        raise Unfit("its heads have no fixed number and width")
    if not width == key_width == value_width:
        raise Unfit(
            f"its keys have width {key_width}, its values {value_width}: the kernel wants one"
        )
    if width % 8:
        raise Unfit(f"the kernel wants a head width that is a multiple of 8, and it is {width}")
    if heads % groups:
        raise Unfit(f"{heads} heads of queries do not divide among {groups} of keys")
    window = masks.window(node)
    scale, softcap, sinks = _scores(node, width)
    return Cached(node, query, key, value, keys, values, past, window, scale, softcap, sinks)


def _scores(node: fx.Node, width: int) -> tuple[float, float, fx.Node | None]:
    """Scale, cap and sinks of the scores."""
    if node.target is attention_op:
        _, _, _, _, scale, softcap, sinks = node.args
        return float(scale), float(softcap), sinks  # type: ignore[arg-type, return-value]
    if argument(node, 4, "dropout_p", 0.0):
        raise Unfit("it drops values")
    scale = argument(node, 6, "scale")
    return float(scale) if scale is not None else float(width) ** -0.5, 0.0, None


def _joined(past: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The join of a past with this step's part, and that part."""
    joins = [user for user in past.users if not is_call(user, aten.sym_size.int)]
    if len(joins) != 1 or not is_call(joins[0], aten.cat.default):
        raise Unfit(f"{past.name} is read by more than the join with this step's")
    join = joins[0]
    parts: Any = join.args[0]
    if argument(join, 1, "dim", 0) not in (2, -2) or len(parts) != 2 or parts[0] is not past:
        raise Unfit(f"{past.name} is not joined as [past, new] along the length")
    return join, parts[1]


def _attention(keys: fx.Node, values: fx.Node) -> fx.Node:
    """The one attention whose keys and values these are, each perhaps repeated over heads."""
    readers = []
    for join, place in ((keys, 1), (values, 2)):
        ends = _ends(join)
        if len(ends) != 1 or not is_call(ends[0][1], *ATTENTION):
            kinds = sorted({str(end.target) for _, end in ends})
            raise Unfit(
                f"{join.name} is read by {', '.join(kinds) or 'nothing'}, not by one attention"
            )
        given, reader = ends[0]
        if reader.args[place] is not given:
            raise Unfit(f"{join.name} has another part in {reader.name}")
        _check_repeat(join, given, reader)
        readers.append(reader)
    if readers[0] is not readers[1]:
        raise Unfit(f"{keys.name} and {values.name} belong to two attentions")
    return readers[0]


def _ends(join: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(last node of a chain of copies, its reader) for every reader that is no output."""
    found = []
    stack = [join]
    copies = (*COPIES, *EXPANDS, *RESHAPES, aten.repeat_interleave.self_int, aten.slice.Tensor)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.op == "output" or is_call(user, aten.sym_size.int):
                continue
            if is_call(user, *copies):
                stack.append(user)
            else:
                found.append((node, user))
    return found


def _check_repeat(join: fx.Node, given: fx.Node, reader: fx.Node) -> None:
    """Every head comes `heads / groups` times in a row, and nothing else is changed.

    A chain of reshapes and expands from (b, g, n, w) to (b, g r, n, w) that adds an axis behind the
    heads does just that; the check of the whole model runs it too.
    """
    have, want = sizes_of(join), sizes_of(given)
    if have == want:
        return
    node: Any = given
    added = False
    while node is not join:
        if is_call(node, aten.slice.Tensor) and sizes_of(node) != sizes_of(node.args[0]):
            raise Unfit(f"a part of {join.name} is cut off")
        if is_call(node, aten.unsqueeze.default):
            if node.args[1] != 2:
                raise Unfit(f"the heads of {join.name} are repeated in another order")
            added = True
        added = added or is_call(node, aten.repeat_interleave.self_int)
        node = node.args[0]
    lengths = [have[0], have[2], have[3]] == [want[0], want[2], want[3]]
    if not added or not lengths:
        raise Unfit(f"the heads of {join.name} are not repeated one by one")


class _Masks:
    """The masks of a program, each read once."""

    def __init__(self, editor: Editor, record: Generation, pasts: list[fx.Node]) -> None:
        self.state = editor.state
        self.mask = record.mask
        # Every past was traced with a size of its own; they are one size, and masks use any.
        self.sizes = list(dict.fromkeys(sizes_of(past)[2] for past in pasts if _is_cache(past)))
        self._forms: dict[fx.Node, MaskForm | None] = {}

    def window(self, node: fx.Node) -> int | None:
        """Keys that a query sees, itself included, where its mask says just that.

        Raises:
            Unfit: the mask says something else.
        """
        mask = argument(node, 3, "attn_mask")
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
            raise Unfit("its mask is no boolean one over past and new keys")
        if mask not in self._forms:
            found = (mask_form(mask, self.state, size) for size in self.sizes)
            self._forms[mask] = next((form for form in found if form and form.causal), None)
        form = self._forms[mask]
        if form is None:
            raise Unfit("its mask says more than causal, padding and one window")
        if form.keys is None or form.keys.op != "placeholder" or form.keys.target != self.mask:
            raise Unfit(f"its mask does not read {self.mask!r} for every key")
        return form.window


def _is_cache(past: fx.Node) -> bool:
    return bool(past.meta["val"].dim() == 4)


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
    editor: Editor, cached: Cached, lengths: tuple[fx.Node, fx.Node], rotary: Rotary | None
) -> None:
    node = cached.node
    heads, width = sizes_of(cached.query)[1], sizes_of(cached.query)[3]
    groups = sizes_of(cached.key)[1]
    batch, length = size(editor, cached.query, 0, node), size(editor, cached.query, 2, node)
    sources = (cached.query, cached.key) if rotary is None else (rotary.query, rotary.key)
    query, key, value = (
        x if x.meta["val"].dim() == 3 else merge_heads(editor, x, node)
        for x in (*sources, cached.value)
    )
    total = size(editor, cached.keys, 2, node)
    past = (batch, groups, total, width)
    stand_in = cached.query.meta["val"]
    stand_in = stand_in.transpose(1, 2).flatten(2)
    tables = (None, None) if rotary is None else rotary.tables
    made = onnx_calls(
        editor, "GroupQueryAttention",
        [query, key, value, *cached.past, *lengths, *tables, None, None, cached.sinks],
        [(batch, length, heads * width), past, past], before=node,
        values=[stand_in, cached.keys.meta["val"], cached.values.meta["val"]],
        num_heads=heads, kv_num_heads=groups, scale=cached.scale,
        local_window_size=cached.window, do_rotary=1 if rotary else None,
        softcap=cached.softcap or None,
    )  # fmt: skip
    result, keys, values = (
        insert(editor, operator.getitem, made, place, before=node, value=value)
        for place, value in enumerate(made.meta["val"])
    )
    output = editor.graph.output_node()
    output.replace_input_with(cached.keys, keys)
    output.replace_input_with(cached.values, values)
    put_merged(editor, node, result, batch, length, heads, width)
