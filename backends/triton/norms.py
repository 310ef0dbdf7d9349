"""Rewrites to rms_norm, add_rms_norm and add_layer_norm."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphwright.backends.triton.values import is_size, same_kind, unnamed
from graphwright.ir.edit import Editor
from graphwright.ir.ops.norm import add_layer_norm, add_rms_norm, rms_norm
from graphwright.ir.rewrite import Match, Rewrite, const, one_of, op, value

aten = torch.ops.aten

OPTIONAL_WEIGHT = one_of(value("weight"), const("weight"))
OPTIONAL_BIAS = one_of(value("bias"), const("bias"))
EPS = const("eps", lambda v: isinstance(v, float))


def _is_float32(dtype: Any) -> bool:
    return dtype is torch.float32


class NoCast(Rewrite):
    """x.to(its own dtype) -> x. Such casts stand between the parts of other patterns."""

    pattern = op(aten.to.dtype, value("x"), const("dtype"))

    def condition(self, match: Match, editor: Editor) -> str | None:
        same = match.node("x").meta["val"].dtype == match["dtype"]
        return None if same else "it changes the dtype"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        return match.node("x")


class SpelledRmsNorm(Rewrite):
    """weight * (x * rsqrt(mean(x^2) + eps)), with the casts that half-precision models put in.

    Llama, Mistral, Qwen: weight * normalized.to(dtype). T5: the same without a cast in float32.
    Gemma: (normalized * (1 + weight)).to(dtype), where 1 + weight is computed beforehand.
    """

    _x = value("x")
    _wide = one_of(op(aten.to.dtype, _x, unnamed(_is_float32)), _x)
    _square = one_of(op(aten.pow.Tensor_Scalar, _wide, unnamed(lambda v: v == 2)),
                     op(aten.mul.Tensor, _wide, _wide),
                     op(aten.square.default, _wide))  # fmt: skip
    _mean = op(aten.mean.dim, _square, unnamed(lambda v: list(v) == [-1]), True)
    _scale = op(aten.rsqrt.default, op(aten.add.Tensor, _mean, EPS, commutative=True))
    _core = op(aten.mul.Tensor, _wide, _scale, commutative=True)
    _narrow = one_of(op(aten.to.dtype, _core, unnamed()), _core)
    _product = op(aten.mul.Tensor, value("weight"), _narrow, commutative=True)
    pattern = one_of(op(aten.to.dtype, _product, unnamed()), _product)

    def condition(self, match: Match, editor: Editor) -> str | None:
        x, weight = match.node("x").meta["val"], match.node("weight").meta["val"]
        if not x.is_floating_point() or match.root.meta["val"].dtype != x.dtype:
            return "the result has another dtype than the input"
        if weight.dim() != 1 or not is_size(weight.shape[0], x.shape[-1]):
            return "the weight is no vector over the last dimension"
        return None

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        return editor.call(rms_norm, match["x"], match["weight"], match["eps"], before=match.root)


class AtenRmsNorm(Rewrite):
    """aten.rms_norm over the last dimension: torch runs it as separate kernels too."""

    pattern = op(aten.rms_norm.default, value("x"), const("shape", lambda v: len(v) == 1),
                 OPTIONAL_WEIGHT, EPS)  # fmt: skip

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        return editor.call(rms_norm, match["x"], match["weight"], match["eps"], before=match.root)


class _AddNorm(Rewrite):
    """norm(a + b): the norm and the sum from one call."""

    target: Any

    def condition(self, match: Match, editor: Editor) -> str | None:
        total = match.node("total")
        if not same_kind(match.node("a"), match.node("b"), total):
            return "the addition broadcasts or changes the dtype"
        early = [user for user in total.users if user < match.root]
        if self._is_late(match) and early:
            return f"{early[0].name} reads the sum before the norm's weight is computed"
        return None

    def _is_late(self, match: Match) -> bool:
        """Whether a parameter of the norm is computed after the sum (Gemma's 1 + weight)."""
        total = match.node("total")
        return any(isinstance(n, fx.Node) and not n < total for n in self.parameters(match))

    def parameters(self, match: Match) -> tuple[Any, ...]:
        """Arguments of the norm behind the two addends."""
        return match["weight"], match["eps"]

    def replacement(self, match: Match, editor: Editor) -> fx.Node | None:
        total = match.node("total")
        keep = len(total.users) > 1
        place = match.root if self._is_late(match) else total
        both = editor.call(
            self.target, match["a"], match["b"], *self.parameters(match), keep, before=place,
            like=match.root,
        )  # fmt: skip
        normalized = editor.call(operator.getitem, both, 0, before=place, like=match.root)
        if keep:
            stored = editor.call(operator.getitem, both, 1, before=place, like=total)
            editor.replace(match.root, normalized)
            editor.replace(total, stored)
            return None
        return normalized


def _sum() -> Any:
    return op(aten.add.Tensor, value("a"), value("b"), name="total", shared=True)


class AddRmsNorm(_AddNorm):
    """rms_norm(a + b)."""

    target = add_rms_norm
    pattern = op(rms_norm, _sum(), OPTIONAL_WEIGHT, EPS)


class AddLayerNorm(_AddNorm):
    """layer_norm(a + b) over the last dimension."""

    target = add_layer_norm
    pattern = op(aten.layer_norm.default, _sum(), const("shape", lambda v: len(v) == 1),
                 OPTIONAL_WEIGHT, OPTIONAL_BIAS, EPS, rest=True)  # fmt: skip

    def parameters(self, match: Match) -> tuple[Any, ...]:
        return match["weight"], match["bias"], match["eps"]
