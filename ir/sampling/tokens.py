"""Tokens of attention that are pushed away from those of the first sample (P30), as calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta
from graphwright.ir.program import Program
from graphwright.ir.sampling.surgery import with_outputs

aten = torch.ops.aten

PUSHED = "pushed"
"""Mark on a node whose last argument is its value without the push."""

CHUNK = 1024
"""Tokens that are compared with all of the first sample's at a time."""

WHOLE = 9223372036854775807

Match = Literal["paper", "released"]


@dataclass(frozen=True)
class Push:
    """How tokens are pushed.

    Attributes:
        strength: alpha; a token h becomes (1 + alpha) h - alpha r.
        threshold: cosine from which on.
        match: `paper`: r is the token of the first sample that is most like h. `released`: as the
            authors' code indexes, see `sample.negtome`.
        skipped: tokens in front that are none of the image.
    """

    strength: float
    threshold: float
    match: Match = "paper"
    skipped: int = 0


def pushed(editor: Editor, tokens: fx.Node, sample: fx.Node, push: Push) -> fx.Node:
    """Puts the push behind `tokens`, for all that read them.

    Rows with the condition are pushed from the first row with it, rows without it from the first
    one without: the number of such groups is read off the sizes, so that the same calls serve a
    program whose rows are doubled and what is left of it where they are not.

    Args:
        editor: of the program.
        tokens: [groups * batch, tokens, width].
        sample: input with a row per sample.
        push: how.

    Returns:
        the node with the tokens that are read now.
    """
    readers = list(tokens.users)
    before = tokens.next
    count, width = (int(size) for size in tokens.meta["val"].shape[1:])

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, *args, before=before, like=tokens)

    own = call(aten.slice.Tensor, tokens, 1, push.skipped, WHOLE) if push.skipped else tokens
    left = count - push.skipped
    batch = call(aten.sym_size.int, sample, 0)
    grouped = call(aten.reshape.default, own, [-1, batch, left, width])
    first = call(aten.slice.Tensor, grouped, 1, 0, 1)
    units = [_unit(call, part) for part in (grouped, first)]
    asked, answers = units if push.match == "paper" else units[::-1]
    likeness, place = _most_like(call, asked, answers, left)
    index = call(aten.expand.default, call(aten.unsqueeze.default, place, -1), [-1, -1, -1, width])
    wide = call(aten.expand.default, first, [-1, batch, -1, -1])
    picked = call(aten.gather.default, wide, 2, index)
    grown = call(aten.mul.Tensor, grouped, 1 + push.strength)
    moved = call(aten.sub.Tensor, grown, call(aten.mul.Tensor, picked, push.strength))
    near = call(aten.gt.Scalar, call(aten.unsqueeze.default, likeness, -1), push.threshold)
    moved, near = (call(aten.flatten.using_ints, part, 0, 1) for part in (moved, near))
    made = call(aten.where.self, near, moved, own)
    set_gw_meta(made, **{PUSHED: True})
    if push.skipped:
        text = call(aten.slice.Tensor, tokens, 1, 0, push.skipped)
        made = call(aten.cat.default, [text, made], 1)
    for reader in readers:
        reader.replace_input_with(tokens, made)
    return made


def _unit(call: Any, tokens: fx.Node) -> fx.Node:
    """Tokens of length 1."""
    square = call(aten.sum.dim_IntList, call(aten.mul.Tensor, tokens, tokens), [-1], True)
    length = call(aten.clamp_min.default, call(aten.sqrt.default, square), 1e-12)
    made: fx.Node = call(aten.div.Tensor, tokens, length)
    return made


def _most_like(call: Any, asked: fx.Node, answers: fx.Node, count: int) -> tuple[fx.Node, fx.Node]:
    """Largest cosine of every asked token, and where it is; [groups, batch, tokens]."""
    turned = call(aten.transpose.int, answers, 2, 3)
    found = []
    for start in range(0, count, CHUNK):
        whole = count <= CHUNK
        part = asked if whole else call(aten.slice.Tensor, asked, 2, start, start + CHUNK)
        cosines = call(aten.matmul.default, part, turned)
        found.append(
            (call(aten.amax.default, cosines, [-1]), call(aten.argmax.default, cosines, -1))
        )
    if len(found) == 1:
        return found[0]
    largest, places = (call(aten.cat.default, list(parts), 2) for parts in zip(*found, strict=True))
    return largest, places


def without_push(program: Program) -> Program:
    """A program whose tokens stay where they are."""
    editor = Editor(program, by="sampling")
    for node in list(editor.graph.nodes):
        if gw_meta(node).get(PUSHED):
            own: Any = node.args[-1]
            node.replace_all_uses_with(own)
    editor.changed = True
    return with_outputs(editor, [spec.name for spec in program.signature.outputs])
