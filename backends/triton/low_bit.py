"""Rewrites to the products and embeddings on weights that stay compressed.

What is done to the columns of a weight is done to the columns of its input instead, and a low-rank
correction becomes two small products:

    x @ (V[:, order] * scale + shift).T = (x * scale)[:, inverse of order] @ V.T + (x @ shift) 1
    x @ (V + b a).T                     = x @ V.T + (x @ a.T) @ b.T
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.backends.triton.activations import activation_name, is_activation
from graphwright.backends.triton.values import same_kind
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_value, depends_on_input
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.ops.adapted_linear import adapted_linear
from graphwright.ir.ops.blocks import dequantize_blocks
from graphwright.ir.ops.blocks_linear import blocks_linear
from graphwright.ir.ops.codebook_linear import codebook_linear
from graphwright.ir.ops.embedding import blocks_embedding, table_embedding
from graphwright.ir.ops.low_rank import add_low_rank
from graphwright.ir.ops.table import dequantize_table
from graphwright.ir.ops.table_linear import table_linear
from graphwright.ir.rewrite import Match, Rewrite, op, value
from graphwright.ir.stored.read import PRODUCTS, Form, form_of, is_call, plain, product_of

aten = torch.ops.aten

LINEARS = (blocks_linear, table_linear, codebook_linear, adapted_linear)
ADDED = {blocks_linear: 7, table_linear: 6, codebook_linear: 6, adapted_linear: 5}
"""Position of the argument `added`, behind `low` and `b`; the last argument of all is the
activation."""
BIAS = {blocks_linear: 4, table_linear: 3, codebook_linear: 3, adapted_linear: 2}


class LowBitLinear(Rewrite):
    """A product with a compressed weight: the weight stays as stored."""

    pattern = op(PRODUCTS, value("left"), value("right"), rest=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        found = product_of(match.root)
        if found is None or form_of(found[1]) is None:
            return "its weight is not compressed"
        form = form_of(found[1])
        assert form is not None
        if form.order is not None and editor.tensor(form.order) is None:
            return "the order of the columns is not stored"
        if not match.root.meta["val"].is_floating_point() or found[0].meta["val"].dim() == 0:
            return "the input is no floating-point tensor"
        return None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        found = product_of(match.root)
        assert found is not None
        form = form_of(found[1])
        assert form is not None
        return Builder(editor, match.root).product(*found, form)


class Builder:
    """Inserts the calls of a product in front of a node."""

    def __init__(self, editor: Editor, before: fx.Node) -> None:
        self.editor = editor
        self.before = before

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.editor.call(target, *args, before=self.before)

    def product(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, form: Form) -> fx.Node:
        """The calls that compute the layer, chained when the weight has several lookups."""
        low, b = self.low_rank(x, weight, form)
        x = self.columns(x, form)
        y: fx.Node | None = None
        total = form.parts[-1][1]
        for start, end, terms in form.parts:
            inputs = x if end - start == total else self.call(aten.slice.Tensor, x, -1, start, end)
            for term in terms:
                rest = (bias, low, b) if y is None else (None, None, None)
                y = self.linear(inputs, term, (*rest, y))
        assert y is not None
        return y

    def low_rank(
        self, x: fx.Node, weight: fx.Node, form: Form
    ) -> tuple[fx.Node | None, fx.Node | None]:
        """x times the corrections' first factors, and their second factors side by side."""
        pairs = list(form.low_rank)
        if form.shift is not None:
            row = self.call(aten.unsqueeze.default, form.shift, 0)
            value = weight.meta["val"]
            ones = self.editor.add_state(
                self.name(f"{_stored_name(form)}_ones"),
                torch.ones((int(value.shape[0]), 1), dtype=value.dtype),
            )
            pairs.append((self.get(ones), row))
        if not pairs:
            return None, None
        b, a = pairs[0]
        if len(pairs) > 1:
            b = self.call(aten.cat.default, [pair[0] for pair in pairs], 1)
            a = self.call(aten.cat.default, [pair[1] for pair in pairs], 0)
        return self.call(aten.linear.default, x, a), b

    def columns(self, x: fx.Node, form: Form) -> fx.Node:
        """The input with the scales and the order of the weight's columns."""
        if form.scale is not None:
            x = self.call(aten.mul.Tensor, x, form.scale)
        if form.order is None:
            return x
        order = self.editor.tensor(form.order)
        assert order is not None
        name = self.name(f"{form.order.target}_inverse")
        inverse = self.editor.add_state(name, order.argsort().to(order.dtype))
        return self.call(aten.index_select.default, x, -1, self.get(inverse))

    def linear(self, x: fx.Node, term: fx.Node, rest: tuple[fx.Node | None, ...]) -> fx.Node:
        """One fused call; `rest` is bias, low, b, added."""
        if term.target is dequantize_blocks:
            codes, scale, zero_point, bits, block, _ = full_arguments(term)[0]
            return self.call(blocks_linear, x, codes, scale, zero_point, *rest, bits, block, "none")
        if term.target is dequantize_table:
            codes, scale, table, block, shape = full_arguments(term)[0]
            scale = self.constant(scale)
            return self.call(table_linear, x, codes, scale, *rest, table, block, shape[0], "none")
        indices, codebooks, bits, rows, _ = full_arguments(term)[0]
        return self.call(codebook_linear, x, indices, plain(codebooks), *rest, bits, rows, "none")

    def constant(self, scale: fx.Node) -> fx.Node:
        """Scales that are themselves quantized, computed once: a stored tensor."""
        found = _constant(self.editor, scale)
        if found is None or scale.op == "get_attr":
            return scale
        stored = next(node for node in _leaves(scale))
        name = f"{stored.target}_rebuilt"
        if name not in self.editor.state:
            self.editor.add_state(name, found)
        return self.get(name)

    def get(self, name: str) -> fx.Node:
        return self.editor.get(name)

    def name(self, wanted: str) -> str:
        """A name that the program's state does not have."""
        name, count = wanted, 1
        while name in self.editor.state:
            count += 1
            name = f"{wanted}{count}"
        return name


def _stored_name(form: Form) -> str:
    return str(next(_leaves(form.parts[0][2][0])).target)


def _leaves(node: fx.Node) -> Iterator[fx.Node]:
    """The stored tensors that a node is computed from."""
    if node.op == "get_attr":
        yield node
    for source in node.all_input_nodes:
        yield from _leaves(source)


def _constant(editor: Editor, node: fx.Node) -> Tensor | None:
    """The value of a node that depends on stored tensors only."""
    return None if depends_on_input(node) else constant_value(editor, node)


class LowBitEmbedding(Rewrite):
    """An embedding of a compressed table: only the wanted rows are rebuilt."""

    pattern = op(aten.embedding.default, value("weight"), value("indices"), rest=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        form = form_of(match.node("weight"))
        if form is None or not is_call(form.parts[0][2][0], dequantize_blocks, dequantize_table):
            return "its table is not stored in blocks"
        return None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        form = form_of(match.node("weight"))
        assert form is not None
        builder = Builder(editor, match.root)
        ids, stored = match.node("indices"), form.parts[0][2][0]
        dtype = match.root.meta["val"].dtype
        if stored.target is dequantize_blocks:
            new = builder.call(blocks_embedding, ids, *full_arguments(stored)[0])
        else:
            codes, scale, table, block, shape = full_arguments(stored)[0]
            scale = builder.constant(scale)
            new = builder.call(table_embedding, ids, codes, scale, table, block, *shape)
        if new.meta["val"].dtype != dtype:
            new = builder.call(aten.to.dtype, new, dtype)
        for b, a in form.low_rank:
            low = builder.call(aten.embedding.default, b, ids)
            new = builder.call(aten.add.Tensor, new, builder.call(aten.matmul.default, low, a))
        return new


class LowRankBeside(Rewrite):
    """linear(x, weight + b a) of a weight that another op rebuilds: two small products beside it.

    The rewrites of that op then find the plain weight.
    """

    pattern = op(
        aten.linear.default, value("x"), op(add_low_rank, value("weight"), value("b"), value("a"),
        shared=True), rest=True,
    )  # fmt: skip

    def condition(self, match: Match, editor: Editor) -> str | None:
        stored = match.node("weight").op == "get_attr"
        return "the weight is stored as it is" if stored else None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        builder = Builder(editor, match.root)
        x, bias = match["x"], full_arguments(match.root)[0][2]
        y = builder.call(aten.linear.default, x, match["weight"], bias)
        low = builder.call(aten.linear.default, x, match["a"])
        return builder.call(aten.add.Tensor, y, builder.call(aten.linear.default, low, match["b"]))


def _is_open(node: Any) -> bool:
    """Whether a call is a product with an epilogue of ours that can take more in."""
    return is_call(node, *LINEARS) and node.args[-1] == "none" and len(node.users) == 1


class LowBitActivation(Rewrite):
    """activation(low-bit product) -> the activation in its epilogue."""

    pattern = value("act", is_activation)

    def condition(self, match: Match, editor: Editor) -> str | None:
        inner = match.root.args[0]
        return None if _is_open(inner) else "its input is no product with an epilogue of ours"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        inner = match.root.args[0]
        assert isinstance(inner, fx.Node)
        arguments = [*inner.args[:-1], activation_name(match.root)]
        return editor.call(inner.target, *arguments, before=match.root, like=inner)


class LowBitSum(Rewrite):
    """low-bit product + bias or + a tensor of its size -> the sum in its epilogue."""

    pattern = op(aten.add.Tensor, value("y", _is_open), value("other"), commutative=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        y, other = match.node("y"), match.node("other")
        if y is other or self._place(y, other) is None:
            return "the summand has another size or dtype, or there is one already"
        return None

    def _place(self, y: fx.Node, other: fx.Node) -> int | None:
        if same_kind(y, other):
            place = ADDED[y.target]  # type: ignore[index]
        else:
            given, made = other.meta["val"], y.meta["val"]
            vector = isinstance(given, Tensor) and given.shape == (made.shape[-1],)
            if not vector or given.dtype != made.dtype:
                return None
            place = BIAS[y.target]  # type: ignore[index]
        return place if y.args[place] is None else None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        y, other = match.node("y"), match.node("other")
        arguments = list(y.args)
        place = self._place(y, other)
        assert place is not None
        arguments[place] = other
        return editor.call(y.target, *arguments, before=match.root, like=y)
