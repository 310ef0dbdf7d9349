"""Rewrites to int8_linear and scale_mask: what stands around the matrix products."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.backends.triton.activations import activation_name, is_activation
from graphwright.backends.triton.values import same_shape, unnamed
from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.ops.int8 import dequantize
from graphwright.ir.ops.int8_linear import int8_linear
from graphwright.ir.ops.mask import scale_mask
from graphwright.ir.rewrite import Match, Rewrite, const, one_of, op, value

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default)


class Int8Linear(Rewrite):
    """linear(x, dequantize(codes, scale), bias) -> int8_linear: the weight stays one byte."""

    _weight = op(dequantize, value("codes"), value("scale"), const("zero", lambda v: v is None),
                 const("axis"))  # fmt: skip
    _narrow = one_of(op(aten.to.dtype, _weight, unnamed()), _weight)
    pattern = op(aten.linear.default, value("x"), _narrow, one_of(value("bias"), const("bias")))

    def condition(self, match: Match, editor: Editor) -> str | None:
        codes, scale = match.node("codes").meta["val"], match.node("scale").meta["val"]
        if codes.dtype != torch.int8:
            return f"the codes are {codes.dtype}"
        if tuple(scale.shape) != (codes.shape[0],) or match["axis"] not in (0, -2):
            return "the weight has not one scale per output channel"
        return None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        return editor.call(
            int8_linear, match["x"], match["codes"], match["scale"], match["bias"], "none",
            before=match.root,
        )  # fmt: skip


class Int8LinearActivation(Rewrite):
    """activation(int8_linear(..)) -> the activation in its epilogue."""

    pattern = value("act", is_activation)

    def condition(self, match: Match, editor: Editor) -> str | None:
        inner = match.root.args[0]
        if not isinstance(inner, fx.Node) or inner.target is not int8_linear:
            return "its input is no int8_linear"
        if inner.args[4] != "none" or len(inner.users) > 1:
            return "the value before the activation is read elsewhere"
        return None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        inner = match.root.args[0]
        assert isinstance(inner, fx.Node)
        name = activation_name(match.root)
        return editor.call(int8_linear, *inner.args[:4], name, before=match.root, like=inner)


def _factor(scaled: fx.Node) -> float:
    number = full_arguments(scaled)[0][1]
    return 1.0 / number if scaled.target is aten.div.Tensor else float(number)


class ScaleMask(Rewrite):
    """scores * scale + mask, in front of a softmax (attention written out)."""

    _number = unnamed(lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v != 0)
    _scaled = op((aten.mul.Tensor, aten.div.Tensor), value("x"), _number, name="scaled")
    pattern = op(aten.add.Tensor, _scaled, value("mask"), commutative=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        x, mask = match.node("x").meta["val"], match.node("mask").meta["val"]
        result = match.root.meta["val"]
        if not any(user.target in SOFTMAX for user in match.root.users):
            return "no softmax reads it"
        if not isinstance(mask, torch.Tensor) or mask.dim() > x.dim():
            return "the mask has more dimensions than the scores"
        if x.dtype != mask.dtype or result.dtype != x.dtype or not x.is_floating_point():
            return "scores and mask differ in dtype"
        return None if same_shape(result, x) else "the mask enlarges the scores"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        factor = _factor(match.node("scaled"))
        return editor.call(scale_mask, match["x"], match["mask"], factor, before=match.root)
