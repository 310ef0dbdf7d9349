"""cleanup.merge_linear: two linear maps in a row are one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.cleanup._math.affine import CONVOLUTIONS, LINEAR, like

aten = torch.ops.aten


class MergeLinear(Pass):
    """Merges consecutive linear maps with nothing between them, where that shrinks the model.

    - `linear(linear(x))`: W = W2 W1, b = W2 b1 + b2 (products in float64), merged when
      out * in <= hidden * (in + out); a low-rank pair stays a pair;
    - a convolution followed by a 1x1 convolution, and a 1x1 convolution without padding trouble
      followed by a convolution, under the same rule with the kernel's area.

    A pair stays when the middle result is read elsewhere, a weight is shared or computed in the
    graph, groups are used, or the second convolution pads (a padded zero has not been through the
    first one) while the first has a bias.
    """

    contract = "exact"
    weights = "reformed"
    before = ("quantize.*",)

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        actions: list[Action] = []
        merged = True
        while merged:
            merged = False
            for node in list(editor.graph.nodes):
                outcome = _merge(editor, node)
                if outcome is not None:
                    actions.append(outcome)
                    merged |= outcome.what.startswith("merged")
            if merged:
                actions = [a for a in actions if a.what.startswith("merged")]
        return Result(editor.finish(), tuple(actions))


def _merge(editor: Editor, second: fx.Node) -> Action | None:
    if second.op != "call_function" or second.target not in {*CONVOLUTIONS, LINEAR}:
        return None
    first = second.args[0]
    if not isinstance(first, fx.Node) or first.target not in {*CONVOLUTIONS, LINEAR}:
        return None
    reason = _refuse(editor, first, second)
    if reason is not None:
        return Action.left(second.name, reason, "kept")
    weight, bias = _product(editor, first, second)
    pieces = [editor.tensor(n.args[1]) for n in (first, second)]
    before = sum(t.numel() for t in pieces if t is not None)
    if weight.numel() > before:
        reason = f"{before:,} weights would become {weight.numel():,}"
        return Action.left(second.name, reason, "kept")
    _replace(editor, first, second, weight, bias)
    return Action(second.name, f"merged with {first.name}")


def _refuse(editor: Editor, first: fx.Node, second: fx.Node) -> str | None:
    if (first.target is LINEAR) != (second.target is LINEAR):
        return f"{first.name} is another kind of layer"
    if len(first.users) > 1:
        return f"{first.name} is also read by other nodes"
    for node in (first, second):
        for position in (1, 2):
            operand = full_arguments(node)[0][position]
            if operand is None:
                continue
            if editor.tensor(operand) is None:
                return f"a weight of {node.name} is computed in the graph"
            if len(editor.uses(str(operand.target))) > 1:
                return f"{node.name} shares {operand.target} with another layer"
    return None if second.target is LINEAR else _refuse_convolutions(editor, first, second)


def _refuse_convolutions(editor: Editor, first: fx.Node, second: fx.Node) -> str | None:
    one, two = _geometry(editor, first), _geometry(editor, second)
    if one["groups"] != 1 or two["groups"] != 1:
        return "groups do not multiply out"
    if two["pointwise"] and two["trivial"]:
        return None
    if one["pointwise"] and one["trivial"]:
        if two["pads"] and full_arguments(first)[0][2] is not None:
            return f"{second.name} pads with zeros that the bias of {first.name} would have moved"
        return None
    return "neither convolution is 1x1 with stride 1"


def _geometry(editor: Editor, conv: fx.Node) -> dict[str, Any]:
    args, _ = full_arguments(conv)
    weight = editor.tensor(conv.args[1])
    assert weight is not None
    stride, padding = args[3], args[4]
    pads = padding != "valid" if isinstance(padding, str) else any(p != 0 for p in padding)
    pointwise = all(k == 1 for k in weight.shape[2:])
    if pointwise and padding == "same":
        pads = False
    return {
        "groups": args[6],
        "pointwise": pointwise,
        "pads": pads,
        "trivial": all(s == 1 for s in stride) and not pads,
    }


def _product(editor: Editor, first: fx.Node, second: fx.Node) -> tuple[Tensor, Tensor | None]:
    w1, w2 = (_double(editor, n.args[1]) for n in (first, second))
    b1, b2 = (_double(editor, full_arguments(n)[0][2]) for n in (first, second))
    assert w1 is not None
    assert w2 is not None
    if first.target is LINEAR:
        weight = w2 @ w1
        moved = None if b1 is None else w2 @ b1
    else:
        middle_first = all(k == 1 for k in w2.shape[2:])
        flat1, flat2 = w1.flatten(2), w2.flatten(2)
        weight = (
            torch.einsum("om,mik->oik", flat2[..., 0], flat1).view(-1, *w1.shape[1:])
            if middle_first
            else torch.einsum("omk,mi->oik", flat2, flat1[..., 0]).view(
                w2.shape[0], w1.shape[1], *w2.shape[2:]
            )
        )
        moved = None if b1 is None else flat2.sum(2) @ b1
    if moved is None:
        return weight, b2
    return weight, moved if b2 is None else moved + b2


def _double(editor: Editor, node: Any) -> Tensor | None:
    tensor = editor.tensor(node)
    return None if tensor is None else tensor.detach().double()


def _replace(
    editor: Editor, first: fx.Node, second: fx.Node, weight: Tensor, bias: Tensor | None
) -> None:
    weight_node = second.args[1]
    assert isinstance(weight_node, fx.Node)
    old = editor.state[str(weight_node.target)]
    owner = str(weight_node.target).rpartition(".")[0] or str(weight_node.target)
    new_weight = editor.get(editor.add_state(f"{owner}.merged.weight", like(old, weight)))
    new_bias = None
    if bias is not None:
        new_bias = editor.get(editor.add_state(f"{owner}.merged.bias", like(old, bias)))
    args2, _ = full_arguments(second)
    args1, _ = full_arguments(first)
    # The geometry is that of the convolution that is not 1x1.
    w2 = editor.tensor(second.args[1])
    assert w2 is not None
    outer = second.target is LINEAR or any(k != 1 for k in w2.shape[2:])
    rest = args2[3:] if outer else args1[3:]
    target = second.target if outer else first.target
    node = editor.call(target, first.args[0], new_weight, new_bias, *rest, before=second)
    editor.replace(second, node)
    editor.erase(first)
