"""Logits of each row's last token only: the rows in front of the head are cut to one.

A prompt's other logits are the bulk of its head's work, and nobody reads them when text is
generated. The last token of a row is the last that its mask shows among the new ones, so that the
cut is right for rows padded on either side.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.generation.record import Generation
from graphwright.ir.layers.kinds import matrix_product
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature

aten = torch.ops.aten

BY_ELEMENT = (
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.tanh.default,
    aten.add.Tensor, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default,
)  # fmt: skip
"""What may stand between the head and its logits: scales, soft caps, a bias, casts."""


def has_all_logits(signature: Signature, record: Generation) -> bool:
    """Whether a decoder gives the logits behind every token, and not the last one's alone."""
    (spec,) = [spec for spec in signature.outputs if spec.name == record.logits]
    return spec.shape[1] != 1


def last_logits(program: Program) -> Program | None:
    """The program with logits (batch, 1, vocabulary); None where it has no head to cut before."""
    record = Generation.of(program)
    if record is None:
        return None
    names = [spec.name for spec in program.signature.outputs]
    if record.logits not in names:
        return None
    place = names.index(record.logits)
    editor = Editor(program, by="last_logits")
    behind = _from_head(_outputs(editor)[place])
    if not behind:
        return None
    head = behind[0]
    kind = matrix_product(head)
    assert kind is not None
    hidden = head.args[kind.input]
    assert isinstance(hidden, fx.Node)
    args = list(head.args)
    args[kind.input] = _last_rows(editor, record, hidden, head)
    editor.set_args(head, *args, **head.kwargs)
    for node in behind:
        node.meta["val"] = editor.evaluate(node)
    cut = editor.finish(propagate=False)
    spec = program.signature.outputs[place]
    outputs = list(program.signature.outputs)
    outputs[place] = replace(spec, shape=(spec.shape[0], 1, *spec.shape[2:]))
    return cut.replace(signature=replace(program.signature, outputs=tuple(outputs)))


def _outputs(editor: Editor) -> tuple[fx.Node, ...]:
    return editor.graph.output_node().args[0]  # type: ignore[return-value]


def _from_head(logits: fx.Node) -> list[fx.Node]:
    """The product whose rows become the logits one by one, and what is done to them behind it.

    Empty where nothing else than the head's rows may be left out.
    """
    found: list[fx.Node] = []
    node: Any = logits
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.meta["val"].dim() == 3:
        found.insert(0, node)
        if node.target is aten.linear.default:
            return found
        others = [a for a in node.args[1:] if isinstance(a, fx.Node)]
        if node.target not in BY_ELEMENT or any(a.meta["val"].dim() > 1 for a in others):
            return []
        node = node.args[0]
    return []


def _last_rows(editor: Editor, record: Generation, hidden: fx.Node, before: fx.Node) -> fx.Node:
    """(batch, tokens, width) to the last row of each that is no padding: (batch, 1, width)."""
    inputs = {str(n.target): n for n in editor.graph.find_nodes(op="placeholder")}

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return editor.call(target, *args, before=before, like=before, **kwargs)

    if record.mask is None:
        return call(aten.slice.Tensor, hidden, 1, -1, 2**63 - 1)
    ids, mask = inputs[record.ids], inputs[record.mask]
    tokens, total = (call(aten.sym_size.int, node, 1) for node in (ids, mask))
    places = call(aten.arange.default, tokens, dtype=torch.int64, device=mask.meta["val"].device)
    columns = call(aten.add.Tensor, places, call(operator.sub, total, tokens))
    shown = call(aten.ne.Scalar, call(aten.index_select.default, mask, 1, columns), 0)
    last = call(aten.amax.default, call(aten.mul.Tensor, shown, places), [1], True)
    index = call(aten.unsqueeze.default, last, 2)
    width = int(hidden.meta["val"].shape[2])
    index = call(aten.expand.default, index, [-1, 1, width])
    return call(aten.gather.default, hidden, 1, index)
