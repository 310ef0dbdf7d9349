"""reparameterize.norms: norms of weights stored, scales of norms moved into the next layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import adapter_of, arguments
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.reparameterize._weights import stored

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


class Norms(Pass):
    """Takes norms of weights out, and moves gamma and beta of norms into the layers behind them.

    Weights that weight norm or spectral norm compute from parameters are stored as they are in
    inference. A layer norm or an RMS norm that linear layers alone read keeps its normalization
    and hands on its factors: W' = W gamma over input channels, b' = b + W beta.

    A norm whose result something else reads too, or one of whose layers shares its weight, stays,
    with the reason.

    Source: elementary; as the first step of rotations (Ashkboos et al. 2024, "SliceGPT", section
    3.2) for RMS norms.
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    before = ("quantize.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        named = {layer.node.name: layer for layer in layers(program)}
        norms = [node for node in editor.graph.nodes if node.target in NORMS]
        actions = [_fold(editor, node, named) for node in norms]
        if not actions:
            actions.append(Action.left("graph", "no layer norm or RMS norm"))
        return Result(editor.finish(), tuple(actions))


def _fold(editor: Editor, norm: fx.Node, named: dict[str, Layer]) -> Action:
    given = arguments(norm)
    own = named.get(norm.name)
    name = own.name if own is not None else norm.name
    reason = _why_not(editor, norm, given)
    if reason:
        return Action.left(name, reason)
    gamma, beta = (editor.tensor(given.get(part)) for part in ("weight", "bias"))
    readers = list(norm.users)
    for layer in readers:
        _into(editor, layer, gamma, beta)
    rest = {"layer_norm": (None, None, given["eps"]), "rms_norm": (None, given["eps"])}
    kind = "layer_norm" if norm.target is NORMS[0] else "rms_norm"
    editor.set_args(norm, given["input"], given["normalized_shape"], *rest[kind])
    names = ", ".join(named[layer.name].name for layer in readers)
    return Action(name, f"factors moved into {names}")


def _why_not(editor: Editor, norm: fx.Node, given: dict[str, Any]) -> str:
    parts = [given.get(part) for part in ("weight", "bias") if given.get(part) is not None]
    if not parts:
        return "it has no factors"
    if any(editor.tensor(part) is None for part in parts):
        return "its factors are computed in the graph"
    if len(given["normalized_shape"]) != 1:
        return "it normalizes more than the last axis"
    for user in norm.users:
        if adapter_of(user):
            return f"an adapter, {adapter_of(user)}, reads it: merge that first (adapt.merge)"
        if user.target is not aten.linear.default or user.args[0] is not norm:
            return f"{user.name}, no linear layer, reads it"
        if user.args[1] is norm:
            return f"{user.name} reads it as a weight"
        own = arguments(user)
        for operand in (own["weight"], own["bias"]):
            if operand is None:
                continue
            if editor.tensor(operand) is None:
                return f"a weight of {user.name} is computed in the graph"
            if len(editor.uses(str(operand.target))) > 1:
                return f"{user.name} shares {operand.target} with another layer"
    return "" if norm.users else "nothing reads it"


def _into(editor: Editor, layer: fx.Node, gamma: Tensor | None, beta: Tensor | None) -> None:
    given = arguments(layer)
    old = editor.state[str(given["weight"].target)].detach().double()
    weight, bias = given["weight"], given["bias"]
    if gamma is not None:
        wide = gamma.detach().double()
        weight = stored(editor, weight, lambda w: w.double() * wide)
    if beta is not None:
        shift = old @ beta.detach().double()
        if bias is not None:
            bias = stored(editor, bias, lambda b: b.double() + shift)
        else:
            owner = str(given["weight"].target).rpartition(".")[0]
            kind = editor.state[str(given["weight"].target)]
            made = torch.nn.Parameter(shift.to(kind.dtype), requires_grad=kind.requires_grad)
            bias = editor.get(editor.add_state(f"{owner}.bias" if owner else "bias", made))
    editor.set_args(layer, given["input"], weight, bias)
