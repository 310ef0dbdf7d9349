"""Attention with other widths: smaller projections in the place of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import arguments, gw_meta, set_gw_meta
from graphwright.ir.graph.sizes import expression_of
from graphwright.ir.layers.products import input_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.ops.attention import attention as capped_attention
from graphwright.passes.decompose._attention.find import Attention, Projection, shares_heads
from graphwright.passes.decompose._attention.layout import Unlike
from graphwright.passes.decompose._form.stages import like

aten = torch.ops.aten


@dataclass(frozen=True)
class NewScores:
    """Queries and keys of another width.

    Attributes:
        query: (heads, k, in) weights, in the order the rotation has behind them: k / 2 first
            channels of pairs, then their partners.
        query_bias: (heads, k), or None.
        key: (own heads, k, in).
        key_bias: (own heads, k), or None.
        kept: (own heads, k) channels of the head that they were, for the tables of a rotation.
    """

    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    kept: Tensor | None


@dataclass(frozen=True)
class NewValues:
    """Values of another width, and the layer that reads them.

    Attributes:
        value: (own heads, k, in).
        out: (out, heads * k), heads one after the other.
        bias: (out,), or None.
    """

    value: Tensor
    out: Tensor
    bias: Tensor | None


def check_readers(attention: Attention, *, scores: bool, values: bool) -> None:
    """Raises Unlike where what is to be replaced is also read elsewhere, and would stay."""
    parts: list[Projection] = []
    parts += [attention.query, attention.key] if scores else []
    parts += [attention.value] if values else []
    inside = {call for part in parts for call in part.calls}
    inside |= {attention.scores, attention.call, *attention.after}
    replaced = [
        *(call for part in parts for call in part.calls),
        *(attention.after if values else ()),
    ]
    for node in replaced:
        outside = [u for u in node.users if u not in inside and u is not attention.out.node]
        if outside:
            raise Unlike(f"{outside[0].name} also reads {node.name}")


class Rebuild:
    """Puts new projections into attentions of one program.

    Args:
        editor: of a copy of the program that the attentions were found in.
    """

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.by_name = {node.name: node for node in editor.graph.nodes}
        self.sizes: dict[Any, fx.Node] = {}

    def __call__(
        self, attention: Attention, scores: NewScores | None, values: NewValues | None
    ) -> None:
        """Replaces the queries and keys, the values, or both."""
        call = self.by_name[attention.call.name]
        if scores is not None:
            call = self._scores(attention, scores, call)
        if values is not None:
            self._values(attention, values, call)
        self.by_name = {node.name: node for node in self.editor.graph.nodes}

    # ---- queries and keys

    def _scores(self, attention: Attention, new: NewScores, call: fx.Node) -> fx.Node:
        at = self.by_name[attention.scores.name]
        query = self._projected(attention, attention.query, "query", new.query, new.query_bias, at)
        key = self._projected(attention, attention.key, "key", new.key, new.key_bias, at)
        turn = attention.query.rotation
        if turn is not None:
            assert new.kept is not None
            of_query = new.kept[attention.key.groups]
            query = self._rotated(attention.query, query, of_query, "query", at)
            key = self._rotated(attention.key, key, new.kept, "key", at)
        factor = attention.query.factor * attention.key.factor
        editor = self.editor
        if attention.is_one_call:
            key = key if shares_heads(at) else self._repeated(attention.key, key, at)
            rest, kwargs = _scaled(at, attention.query.width, factor)
            made = editor.call(at.target, query, key, at.args[2], *rest, before=at, **kwargs)
            _keep_dropout(at, made)
            editor.replace(at, made)
            return made
        key = self._repeated(attention.key, key, at)
        key = editor.call(aten.transpose.int, key, 2, 3, before=at)
        made = editor.call(aten.matmul.default, query, key, before=at)
        if factor != 1.0:
            made = editor.call(aten.mul.Tensor, made, factor, before=at)
        editor.replace(at, made)
        return call

    def _projected(
        self,
        attention: Attention,
        old: Projection,
        part: str,
        weight: Tensor,
        bias: Tensor | None,
        before: fx.Node,
    ) -> fx.Node:
        """(batch, own heads, length, k) of a new layer on what the old one reads."""
        heads, width = weight.shape[:2]
        x = self.by_name[input_node(old.layer).name]
        name = old.layer.weight.removesuffix(".weight")
        if attention.is_fused:
            name = f"{name}.{part}"
        y = self._linear(old.layer, name, x, weight.flatten(0, 1),
                         None if bias is None else bias.flatten(), before)  # fmt: skip
        batch, length = old.node.meta["val"].shape[0], old.node.meta["val"].shape[2]
        if old.turned:
            length = old.node.meta["val"].shape[3]
        tokens = [self._size(batch), self._size(length)]
        tokens = tokens[::-1] if old.lengthwise else tokens
        shape = [*tokens, int(heads), int(width)]
        y = self.editor.call(aten.reshape.default, y, shape, before=before)
        if old.lengthwise:
            return self.editor.call(aten.permute.default, y, [1, 2, 0, 3], before=before)
        return self.editor.call(aten.transpose.int, y, 1, 2, before=before)

    def _linear(
        self, layer: Layer, name: str, x: fx.Node, weight: Tensor, bias: Tensor | None,
        before: fx.Node,
    ) -> fx.Node:  # fmt: skip
        old = self.editor.program.state[layer.weight]
        w = self.editor.get(self._store(f"{name}.weight", like(old, weight)))
        b = None
        if bias is not None:
            b = self.editor.get(self._store(f"{name}.bias", like(old, bias)))
        like_node = self.by_name[layer.node.name]
        return self.editor.call(aten.linear.default, x, w, b, before=before, like=like_node)

    def _store(self, name: str, value: Tensor) -> str:
        """Stores a tensor under a name, in the place of the one that it replaces."""
        if name in self.editor.state and not self._is_shared(name):
            self.editor.set_state(name, value)
            return name
        return self.editor.add_state(name, value)

    def _is_shared(self, name: str) -> bool:
        return len(self.editor.uses(name)) > 1

    def _rotated(
        self,
        old: Projection,
        x: fx.Node,
        kept: Tensor,
        part: str,
        before: fx.Node,
    ) -> fx.Node:
        turn = old.rotation
        assert turn is not None
        call, half = self.editor.call, int(kept.shape[1]) // 2
        index = self.editor.get(self._store_index(f"{old.layer.name}.{part}_channels", kept))
        cos, sin = (
            self._table(self.by_name[t.name], old, index, kept.shape, before)
            for t in (turn.cos, turn.sin)
        )
        upper = call(aten.slice.Tensor, x, 3, half, 2 * half, before=before)
        lower = call(aten.slice.Tensor, x, 3, 0, half, before=before)
        negative = call(aten.neg.default, upper, before=before)
        turned = call(aten.cat.default, [negative, lower], -1, before=before)
        straight = call(aten.mul.Tensor, x, cos, before=before)
        return call(aten.add.Tensor, straight, call(aten.mul.Tensor, turned, sin, before=before),
                    before=before)  # fmt: skip

    def _store_index(self, name: str, kept: Tensor) -> str:
        return self.editor.add_state(name, kept.flatten().contiguous())

    def _table(
        self,
        table: fx.Node,
        old: Projection,
        index: fx.Node,
        shape: torch.Size,
        before: fx.Node,
    ) -> fx.Node:
        """The columns of a table that every head kept: (batch or 1, heads, length, k)."""
        call = self.editor.call
        while table.meta["val"].dim() < 4:
            table = call(aten.unsqueeze.default, table, 0, before=before)
        if old.heads_axis == 2:
            table = call(aten.transpose.int, table, 1, 2, before=before)
        rows, length = table.meta["val"].shape[0], table.meta["val"].shape[2]
        picked = call(aten.index_select.default, table, 3, index, before=before)
        sizes = [self._size(rows), self._size(length), int(shape[0]), int(shape[1])]
        picked = call(aten.reshape.default, picked, sizes, before=before)
        return call(aten.transpose.int, picked, 1, 2, before=before)

    def _repeated(self, old: Projection, x: fx.Node, before: fx.Node) -> fx.Node:
        """Every own head as often as it is read."""
        heads, own = len(old.groups), len(old.groups.unique())
        if heads == own:
            return x
        call, share = self.editor.call, heads // own
        batch, _, length, width = x.meta["val"].shape
        size = [self._size(batch), own, share, self._size(length), int(width)]
        wide = call(aten.unsqueeze.default, x, 2, before=before)
        wide = call(aten.expand.default, wide, size, before=before)
        flat = [size[0], heads, size[3], size[4]]
        return call(aten.reshape.default, wide, flat, before=before)

    # ---- values

    def _values(self, attention: Attention, new: NewValues, call: fx.Node) -> None:
        editor = self.editor
        value = self._projected(attention, attention.value, "value", new.value, None, call)
        if attention.is_one_call:
            shared = shares_heads(call)
            value = value if shared else self._repeated(attention.value, value, call)
            rest, kwargs = _scaled(call, attention.query.width, 1.0)
            made = editor.call(call.target, *call.args[:2], value, *rest, before=call, **kwargs)
            _keep_dropout(call, made)
        else:
            value = self._repeated(attention.value, value, call)
            made = editor.call(call.target, call.args[0], value, before=call)
        editor.replace(call, made)
        out = self.by_name[attention.out.node.name]
        rank, width = input_node(attention.out).meta["val"].dim(), new.out.shape[1]
        batch, length = (self._size(made.meta["val"].shape[d]) for d in (0, 2))
        tokens = [length, batch] if attention.lengthwise else [batch, length]
        flat = [*tokens, int(width)] if rank == 3 else [-1, int(width)]
        order = [2, 0, 1, 3] if attention.lengthwise else [0, 2, 1, 3]
        y = editor.call(aten.permute.default, made, order, before=out)
        y = editor.call(aten.reshape.default, y, flat, before=out)
        name = attention.out.weight.removesuffix(".weight")
        editor.replace(out, self._linear(attention.out, name, y, new.out, new.bias, out))

    def _size(self, size: Any) -> int | fx.Node:
        """A size as a number, or a node that gives it."""
        if isinstance(size, int):
            return size
        wanted = expression_of(size)
        if wanted.is_Integer:
            return int(wanted)
        if wanted not in self.sizes:
            self.sizes[wanted] = self._first_size(wanted)
        return self.sizes[wanted]

    def _first_size(self, wanted: Any) -> fx.Node:
        """The size as the first tensor in the graph has it."""
        for node in list(self.editor.graph.nodes):
            value = node.meta.get("val")
            sizes = value.shape if isinstance(value, Tensor) and node.op != "get_attr" else ()
            for dim, own in enumerate(sizes):
                if expression_of(own) == wanted:
                    after = node.next
                    while after.op == "placeholder":
                        after = after.next
                    return self.editor.call(aten.sym_size.int, node, dim, before=after)
        raise AssertionError(f"no tensor has the size {wanted}")


def _keep_dropout(old: fx.Node, new: fx.Node) -> None:
    """Lets a call drop out what the old one did while the program trains."""
    set_gw_meta(new, attention_dropout=gw_meta(old).get("attention_dropout"))


def _scaled(call: fx.Node, width: int, factor: float) -> tuple[list[Any], dict[str, Any]]:
    """Arguments behind the values, and named ones, with scores `factor` times as large.

    The scale is always said: its default would be that of the new width.
    """
    scale = arguments(call)["scale"]
    scale = (width**-0.5 if scale is None else scale) * factor
    rest, kwargs = list(call.args[3:]), dict(call.kwargs)
    if call.target is capped_attention:
        rest[1] = scale
    else:
        kwargs["scale"] = scale
    return rest, kwargs
