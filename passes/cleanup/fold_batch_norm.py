"""cleanup.fold_batch_norm: batch norms disappear into the layers beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.cleanup._math import affine

aten = torch.ops.aten


class FoldBatchNorm(Pass):
    """Folds y = (x - mean) / sqrt(var + eps) * gamma + beta into a neighbouring layer.

    With s = gamma / sqrt(var + eps) and t = beta - mean * s, per channel:

    - behind a convolution, transposed convolution or linear layer: w' = w * s over output
      channels, b' = b * s + t;
    - behind a concatenation of channels: the norm is split over the branches, each of which then
      folds or keeps its part;
    - before a convolution or linear layer: w' = w * s over input channels, b' = b + w . t, where
      the convolution pads with nothing (a padded zero is no normalised zero) or t is zero.

    The norm's gamma and beta are remembered in `program.facts` for passes that re-estimate
    statistics. Norms in training mode, layers that share their weight, and layers whose result
    is also read elsewhere are left alone, each with its reason.
    """

    contract = "exact"
    stored_bits = 16
    weights = "reformed"
    before = ("quantize.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        remembered = dict(editor.facts.get(self.id, {}))
        split = [
            Action(_name(node), "split over a concatenation")
            for node in _norms(editor)
            if affine.split_over_concat(editor, node)
        ]
        folded = [_fold(editor, node, remembered) for node in _norms(editor)]
        if remembered:
            editor.facts[self.id] = remembered
        return Result(editor.finish(), (*split, *folded))


def _norms(editor: Editor) -> list[fx.Node]:
    return list(editor.graph.find_nodes(op="call_function", target=aten.batch_norm.default))


def _fold(editor: Editor, norm: fx.Node, remembered: dict[str, Any]) -> Action:
    name = _name(norm)
    args, _ = full_arguments(norm)
    if args[5]:
        return Action.left(name, "is in training mode; its statistics still move", "kept")
    scale_shift = affine.scale_and_shift(editor, norm)
    if scale_shift is None:
        return Action.left(name, "its statistics are not stored tensors", "kept")
    scale, shift = scale_shift
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    reason = affine.refuse_output_fold(editor, source, norm)
    if reason is None:
        layer = affine.fold_into_outputs(editor, source, scale, shift)
        remembered[layer] = affine.statistics(editor, norm)
        editor.replace(norm, source)
        return Action(name, f"folded into {layer}")
    users = list(norm.users)
    behind = affine.refuse_input_fold(editor, norm, users, shift)
    if behind is None:
        layer = affine.fold_into_inputs(editor, users[0], scale, shift)
        editor.replace(norm, source)
        return Action(name, f"folded into {layer}, which reads it")
    return Action.left(name, f"before it: {reason}; behind it: {behind}", "kept")


def _name(node: fx.Node) -> str:
    weight = node.args[1] if isinstance(node.args[1], fx.Node) else node.args[3]
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0]
    return node.name
