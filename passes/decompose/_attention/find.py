"""Attention with projections of its own: softmax(q k^T) v, then a layer that reads all heads.

It is one call of ATen, or written out; masks, biases on scores and dropout may be anything, for
they stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir.graph.nodes import arguments, op_name
from graphwright.ir.layers.heads import FUSED
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.ops.attention import attention as capped_attention
from graphwright.ir.program import Program
from graphwright.passes.decompose._attention.layout import (
    Sizes,
    Unlike,
    assignments,
    head_rows,
    path_from,
    path_to,
    places,
    run,
    shape_at,
)
from graphwright.passes.decompose._attention.rotation import Rotation, rotation

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """The queries, keys or values of an attention.

    Attributes:
        layer: that makes them, maybe together with others.
        node: they as the attention reads them, (batch, heads, length, d); (batch, heads, d, length)
            for keys that are `turned`.
        rows: (heads, d): output of the layer that each channel is.
        groups: (heads,): the head with values of its own that each head reads.
        factor: number they are scaled by.
        rotation: of queries and keys, on the way.
        calls: nodes from the layer to them, both among them.
        heads_axis: of what is rotated.
        turned: the last two dimensions are exchanged.
        lengthwise: the layer has the length in front of the batch.
    """

    layer: Layer
    node: fx.Node
    rows: Tensor
    groups: Tensor
    factor: float
    rotation: Rotation | None
    calls: frozenset[fx.Node]
    heads_axis: int = 1
    turned: bool = False
    lengthwise: bool = False

    @property
    def own(self) -> Tensor:
        """(own heads, d): rows without the heads that repeat others."""
        first = [int((self.groups == g).nonzero()[0]) for g in self.groups.unique()]
        return self.rows[first]

    @property
    def width(self) -> int:
        """Channels of a head."""
        return int(self.rows.shape[1])


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        scores: the call that multiplies queries and keys; the same as `call` where both are one.
        call: the call that multiplies with the values.
        query, key, value: its projections.
        out: the layer that reads all heads.
        columns: (heads, d): input of that layer that each channel of each head is.
        after: nodes between call and layer.
        lengthwise: that layer has the length in front of the batch.
    """

    scores: fx.Node
    call: fx.Node
    query: Projection
    key: Projection
    value: Projection
    out: Layer
    columns: Tensor
    after: frozenset[fx.Node]
    lengthwise: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether projections come out of one layer."""
        nodes = [p.layer.node for p in (self.query, self.key, self.value)]
        return len(set(nodes)) < 3

    @property
    def is_one_call(self) -> bool:
        """Whether it is ATen's call."""
        return self.scores is self.call


def attentions(
    program: Program, layers: Sequence[Layer]
) -> Iterator[tuple[fx.Node, Attention | str]]:
    """Every attention, or the reason why it is none that can be rebuilt, by its call.

    Args:
        program: the program.
        layers: products with a matrix.
    """
    by_node = {layer.node: layer for layer in layers}
    every = list(assignments(program))
    for node in program.graph.nodes:
        found = _calls(node, by_node)
        if found is not None:
            try:
                yield found[1], _attention(*found, by_node, every)
            except Unlike as error:
                yield found[1], str(error)


def _calls(
    node: fx.Node, by_node: dict[fx.Node, Layer]
) -> tuple[fx.Node, fx.Node, tuple[fx.Node, fx.Node, fx.Node]] | None:
    """Scores, call, and the three operands of an attention that a node is, or is the softmax of."""
    if node.target in FUSED:
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        return node, node, (q, k, v)
    if op_name(node) != "softmax":
        return None
    readers = [u for u in _through(node) if u.target is aten.matmul.default and u not in by_node]
    products = [p for p in _back(node) if p not in by_node]
    if len(readers) != 1 or len(products) != 1:
        return None
    (q, k), v = products[0].args[:2], readers[0].args[1]
    if not all(isinstance(operand, fx.Node) for operand in (q, k, v)):
        return None
    return products[0], readers[0], (q, k, v)  # type: ignore[return-value]


def _through(node: fx.Node) -> list[fx.Node]:
    """Readers of a node, and of the casts and moves of it."""
    found = []
    for user in node.users:
        found.extend(_through(user) if op_name(user) in ("to", "clone", "contiguous") else [user])
    return found


def _back(softmax: fx.Node) -> set[fx.Node]:
    """The products that the scores come from, through calls on each element."""
    found: set[fx.Node] = set()
    stack, seen = list(softmax.all_input_nodes), set()
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor):
            continue
        seen.add(node)
        if node.target is aten.matmul.default:
            found.add(node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node) == "to":
            stack.extend(node.all_input_nodes)
    return found


def _attention(
    scores: fx.Node,
    call: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    by_node: dict[fx.Node, Layer],
    every: Sequence[Sizes],
) -> Attention:
    one = scores is call
    if any(node.meta["val"].dim() != 4 for node in operands):
        raise Unlike("its queries, keys and values are not (batch, heads, length, width)")
    if len(scores.users) != 1 and not one:
        raise Unlike("its scores are read by several nodes")
    heads = int(operands[0].meta["val"].shape[1])
    names = ("queries", "keys", "values")
    query, key, value = (
        _projection(node, by_node, every, what, heads, turned=what == "keys" and not one)
        for node, what in zip(operands, names, strict=True)
    )
    if (query.rotation is None) != (key.rotation is None) or query.width != key.width:
        raise Unlike("its queries and keys are not made alike")
    if (
        query.rotation
        and key.rotation
        and not torch.equal(query.rotation.pairs, key.rotation.pairs)
    ):
        raise Unlike("its queries and keys are rotated in other pairs")
    after, reader = path_from(call)
    out = by_node.get(reader)
    if out is None:
        raise Unlike(f"its result goes through {op_name(reader) or reader.op}")
    columns, lengthwise = None, False
    for sizes in every:
        given = places(shape_at(call, sizes))
        moved = run(after[-1] if after else call, {call: given}, sizes)
        columns, lengthwise = _columns(moved, given)
    assert columns is not None
    return Attention(scores, call, query, key, value, out, columns, frozenset(after), lengthwise)


def _columns(moved: Tensor, given: Tensor) -> tuple[Tensor, bool]:
    """(heads, d): where in the last dimension each channel went; and whether the length went in
    front of the batch."""
    batch, heads, length, d = given.shape
    flat = moved.reshape(-1, moved.shape[-1])
    if flat.shape != (batch * length, heads * d):
        raise Unlike("its result is not read head by head")
    order = flat[0].long() - 1  # places of the first token
    head, channel = order // (length * d), order % d
    columns = torch.empty(heads, d, dtype=torch.int64)
    columns[head, channel] = torch.arange(heads * d)
    for lengthwise, axes in ((False, (0, 2, 1, 3)), (True, (2, 0, 1, 3))):
        tokens = given.permute(axes).reshape(batch * length, heads, d)
        if torch.equal(flat, tokens[:, head, channel]):
            return columns, lengthwise
    raise Unlike("its result is not read head by head")


def _projection(
    node: fx.Node,
    by_node: dict[fx.Node, Layer],
    every: Sequence[Sizes],
    what: str,
    heads: int,
    *,
    turned: bool,
) -> Projection:
    last = path_to(node)
    turn = None
    for sizes in every:
        turn = None if what == "values" else rotation(last.source, sizes)
    first = path_to(turn.x) if turn else last
    factor = first.factor * (last.factor if turn else 1.0)
    layer = by_node.get(first.source)
    if layer is None:
        raise Unlike(f"its {what} go through {op_name(first.source) or first.source.op}")
    rows, axis, lengthwise = None, 1, False
    for sizes in every:
        moved = places(shape_at(layer.node, sizes))
        width = moved.shape[-1]
        if turn:
            moved = run(turn.x, {layer.node: moved}, sizes)
            axis = _heads_axis(moved, width)
            moved = run(node, {last.source: moved}, sizes)
        else:
            moved = run(node, {layer.node: moved}, sizes)
        rows, lengthwise = head_rows(moved.transpose(2, 3) if turned else moved, width)
    assert rows is not None
    if len(rows) != heads:  # enable_gqa
        shares = any(shares_heads(user) for user in node.users)
        if heads % len(rows) or not shares:
            raise Unlike(f"it has {heads} heads and {what} of {len(rows)}")
        rows = rows.repeat_interleave(heads // len(rows), 0)
    calls = {layer.node, *first.calls, *last.calls, *(turn.calls if turn else ())}
    if turn and any(_size(table, axis) != 1 for table in (turn.cos, turn.sin)):
        raise Unlike("its heads are rotated by tables of their own")
    return Projection(layer, node, rows, _groups(rows, what), factor, turn, frozenset(calls),
                      axis, turned, lengthwise)  # fmt: skip


def shares_heads(call: fx.Node) -> bool:
    """Whether a call takes fewer keys and values than queries as they are."""
    return call.target is capped_attention or bool(arguments(call).get("enable_gqa"))


def _heads_axis(moved: Tensor, width: int) -> int:
    """The middle dimension along which a token's values lie."""
    token = (moved.long() - 1) // width
    return 1 if torch.equal(token.amax(1), token.amin(1)) else 2


def _size(table: fx.Node, axis: int) -> object:
    """Of a table, on an axis of the four dimensions it is spread over."""
    shape = table.meta["val"].shape
    place = axis - 4 + len(shape)
    return shape[place] if place >= 0 else 1


def _groups(rows: Tensor, what: str) -> Tensor:
    """(heads,): the own head of each."""
    own: list[tuple[int, ...]] = []
    found = []
    for row in rows.tolist():
        if tuple(row) not in own:
            own.append(tuple(row))
        found.append(own.index(tuple(row)))
    groups = torch.tensor(found)
    share = len(found) // len(own)
    even = torch.arange(len(own)).repeat_interleave(share)
    distinct = len({r for row in own for r in row})
    if not torch.equal(groups, even) or distinct != rows.shape[1] * len(own):
        raise Unlike(f"its heads do not share {what} in equal groups")
    return groups
