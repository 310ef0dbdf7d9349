"""Rewrites to bias_act and gated_act: spelled-out activations, biases, gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphwright.backends.triton.values import is_size, near, same_kind
from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.ops.activation import bias_act
from graphwright.ir.ops.gated import gated_act
from graphwright.ir.rewrite import Match, Op, Rewrite, one_of, op, value

aten = torch.ops.aten

ATEN_ACTIVATIONS = (aten.relu.default, aten.silu.default, aten.gelu.default)


def activation_name(node: fx.Node) -> str:
    """Name of the activation a call computes, or an empty string."""
    if node.target is bias_act and node.args[1] is None:
        return str(node.args[2])
    if node.target is aten.gelu.default:
        tanh = full_arguments(node)[1].get("approximate") == "tanh"
        return "gelu_tanh" if tanh else "gelu"
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(node.target, "")  # type: ignore[call-overload, no-any-return]


def is_activation(node: fx.Node) -> bool:
    """Whether a call is one of our activations, not yet merged with a bias."""
    return node.op == "call_function" and bool(activation_name(node))


def cube(x: Any) -> Any:
    """x ** 3, as a power or as products."""
    square = op(aten.mul.Tensor, x, x)
    return one_of(
        op(aten.pow.Tensor_Scalar, x, near(3)), op(aten.mul.Tensor, square, x, commutative=True)
    )


class SpelledActivation(Rewrite):
    """An activation written in elementary ops, one per name."""

    def __init__(self, name: str, pattern: Op) -> None:
        self.name = name
        self.pattern = pattern

    def condition(self, match: Match, editor: Editor) -> str | None:
        same = same_kind(match.node("x"), match.root)
        return None if same else "the dtype changes inside the activation"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        return editor.call(bias_act, match.node("x"), None, self.name, before=match.root)


def spelled_activations() -> list[Rewrite]:
    """Tanh GELU (GPT-2, T5, Gemma), erf GELU, quick GELU (CLIP), SiLU, as models write them."""
    x = value("x")
    mul, add = aten.mul.Tensor, aten.add.Tensor
    cubic = op(add, x, op(mul, cube(x), near(0.044715), commutative=True), commutative=True)
    tanh = op(aten.tanh.default, op(mul, cubic, near(math.sqrt(2 / math.pi)), commutative=True))
    erf = op(
        aten.erf.default,
        one_of(
            op(mul, x, near(math.sqrt(0.5))),
            op(aten.div.Tensor, x, near(math.sqrt(2))),
        ),
    )
    found = [
        (
            "quick_gelu",
            op(mul, x, op(aten.sigmoid.default, op(mul, x, near(1.702))), commutative=True),
        ),
        ("silu", op(mul, x, op(aten.sigmoid.default, x), commutative=True)),
    ]
    for name, inner in (("gelu_tanh", tanh), ("gelu", erf)):
        shifted = op(add, inner, near(1))
        half = op(mul, x, near(0.5))
        found.append((name, op(mul, half, shifted, commutative=True)))
        found.append((name, op(mul, op(mul, x, shifted, commutative=True), near(0.5))))
    return [SpelledActivation(name, pattern) for name, pattern in found]


class GatedActivation(Rewrite):
    """activation(gate) * up -> gated_act(gate, up)."""

    pattern = op(aten.mul.Tensor, value("act", is_activation), value("up"), commutative=True)

    def condition(self, match: Match, editor: Editor) -> str | None:
        act, up = match.node("act"), match.node("up")
        if len(act.users) > 1:
            return "the activated gate is read elsewhere"
        return None if same_kind(act, up, match.root) else "gate and up differ in shape or dtype"

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        act = match.node("act")
        return editor.call(
            gated_act, act.args[0], match["up"], activation_name(act), before=match.root
        )


def _is_row_vector(node: fx.Node) -> bool:
    tensor = node.meta.get("val")
    return isinstance(tensor, torch.Tensor) and tensor.dim() == 1


class BiasActivation(Rewrite):
    """activation(linear(x, w, bias)) or activation(y + bias) -> bias_act(.., bias)."""

    pattern = value("act", is_activation)

    def condition(self, match: Match, editor: Editor) -> str | None:
        inner = match.root.args[0]
        if not isinstance(inner, fx.Node) or inner.op != "call_function":
            return "its input is no call"
        if _split_bias(inner) is None:
            return "no bias is added in front of it"
        return (
            None if len(inner.users) == 1 else "the value before the activation is read elsewhere"
        )

    def replacement(self, match: Match, editor: Editor) -> fx.Node:
        inner = match.root.args[0]
        assert isinstance(inner, fx.Node)
        found = _split_bias(inner)
        assert found is not None
        source, bias = found
        if inner.target is aten.linear.default:
            source = editor.call(
                aten.linear.default, inner.args[0], inner.args[1], before=match.root, like=inner
            )
        return editor.call(bias_act, source, bias, activation_name(match.root), before=match.root)


def _split_bias(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(what the bias is added to, bias), when `node` adds one along its last dimension."""
    args, kwargs = full_arguments(node)
    if node.target is aten.linear.default and isinstance(args[2], fx.Node):
        return args[0], args[2]
    if node.target is not aten.add.Tensor or kwargs.get("alpha") != 1:
        return None
    for source, bias in ((args[0], args[1]), (args[1], args[0])):
        both = isinstance(source, fx.Node) and isinstance(bias, fx.Node)
        if both and _is_row_vector(bias) and same_kind(source, node):
            wide = is_size(source.meta["val"].shape[-1], bias.meta["val"].shape[0])
            if wide and bias.meta["val"].dtype == source.meta["val"].dtype:
                return source, bias
    return None
