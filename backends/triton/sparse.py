"""Rewrite to linear_2_4: a layer on a weight with two of every four entries."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.ops.expand_2_4 import expand_2_4
from graphwright.ir.ops.linear_2_4 import linear_2_4
from graphwright.ir.rewrite import Match, Rewrite, const, one_of, op, value

aten = torch.ops.aten


class Linear24(Rewrite):
    """linear(x, expand_2_4(values, places), bias) -> linear_2_4: the weight stays as stored."""

    _weight = op(expand_2_4, value("values"), value("places"), shared=True)
    pattern = op(aten.linear.default, value("x"), _weight, one_of(value("bias"), const("bias")))

    def condition(self, match: Match, editor: Editor) -> str | None:
        same = match.node("x").meta["val"].dtype == match.node("values").meta["val"].dtype
        return None if same else "the input has another dtype than the weight"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        return editor.call(
            linear_2_4, match["x"], match["values"], match["places"], match["bias"],
            before=match.root,
        )  # fmt: skip
