"""reparameterize.subpixel: transposed convolutions as plain ones and a shuffle, and back."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import arguments
from graphwright.ir.layers.kinds import TRANSPOSED_CONVOLUTIONS
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.layers.transposed import SubPixel, sub_pixel
from graphwright.ir.options import Options, Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.reparameterize._shuffle.back import transposed_form
from graphwright.passes.reparameterize._shuffle.shuffle import shuffled
from graphwright.passes.reparameterize._weights import stored

aten = torch.ops.aten

PLAIN = {n: getattr(aten, f"conv{n}d").default for n in (1, 2, 3)}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input,
              3: aten.conv_transpose3d.input}  # fmt: skip
END = 2**63 - 1


class SubpixelOptions(Options):
    """Options of reparameterize.subpixel."""

    to: Literal["shuffle", "transposed"] = "shuffle"
    """`shuffle`: transposed convolutions become a convolution and a shuffle; `transposed`: a
    convolution that a shuffle alone reads becomes a transposed convolution."""

    targets: Selector = ("*",)
    """Layers to rewrite: selector patterns over names and kinds."""


class Subpixel(Pass[SubpixelOptions]):
    """Writes a transposed convolution as a plain one with a shuffle of channels, or back.

    In 1, 2 or 3 dimensions, with any kernel, stride, padding, output padding, dilation and groups,
    each different along every axis. The results of one remainder modulo the stride are a plain
    convolution; all remainders are its channels, which the shuffle moves to where they belong
    (`pixel_shuffle` in two dimensions with one stride, else reshape, permute, reshape), and what
    the padding takes away is cut off. The form taken is the one with the smallest window: kernel 4,
    stride 2, padding 1 becomes 2 x 2 taps, all in use.

    Back, the bias must be the same for all phases of a channel, the convolution must have stride
    and dilation 1, and what its padding leaves must be what a transposed convolution can give.

    Source: the algebra is ours; sub-pixel decoders in place of transposed convolutions are those
    of Shi et al. 2016, "ESPCN", and of P54, "neU-Net" (there they are trained anew).
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    papers = ("P54",)
    before = ("quantize.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        twin = dict(zip(program.graph.nodes, editor.graph.nodes, strict=True))
        if self.options.to == "shuffle":
            kinds: tuple[str, ...] = TRANSPOSED_CONVOLUTIONS
            if not layers(program, kinds) and self.options.targets == ("*",):
                return Result(program, (Action.left("graph", "no transposed convolution"),))
            found = select(program, self.options.targets, kinds)
            actions = [_to_shuffle(editor, layer, twin[layer.node]) for layer in found]
        else:
            found = select(program, self.options.targets, [f"conv{n}d" for n in PLAIN])
            tried = [_to_transposed(editor, layer, twin[layer.node]) for layer in found]
            actions = [action for action in tried if action is not None]
            if not actions:
                actions = [Action.left("graph", "no shuffle reads a convolution")]
        return Result(editor.finish(), tuple(actions))


def _to_shuffle(editor: Editor, layer: Layer, node: fx.Node) -> Action:
    given, form = arguments(node), sub_pixel(node)
    assert form is not None
    if not layer.weight or (given["bias"] is not None and editor.tensor(given["bias"]) is None):
        return Action.left(layer.name, "its weight is computed in the graph")
    if node.meta["val"].dim() != len(form.axes) + 2:
        return Action.left(layer.name, "it runs without a batch axis")
    weight = stored(editor, given["weight"], form.weight)
    bias = None if given["bias"] is None else stored(editor, given["bias"], form.channels)
    y = _plain(editor, form, node, given["input"], weight, bias)
    y = shuffled(editor, y, form.stride, node)
    for axis, (begin, end) in enumerate(zip(form.begin, form.end, strict=True), start=2):
        if begin or end:
            stop = -end if end else END
            y = editor.call(aten.slice.Tensor, y, axis, begin, stop, before=node, like=node)
    editor.replace(node, y)
    cut = ", cut" if any(form.begin) or any(form.end) else ""
    window = " x ".join(map(str, form.taps))
    return Action(layer.name, f"convolution with a window of {window}, shuffled{cut}")


def _plain(
    editor: Editor, form: SubPixel, node: fx.Node, x: Any, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    pads = [axis.pad for axis in form.axes]
    padding = [low for low, _ in pads]
    if any(low != high or low < 0 for low, high in pads):
        amounts = [n for ends in reversed(pads) for n in ends]
        x = editor.call(aten.pad.default, x, amounts, before=node, like=node)
        padding = [0] * len(pads)
    ones = [1] * len(pads)
    return editor.call(PLAIN[len(pads)], x, weight, bias, ones, padding, ones, form.groups,
                       before=node, like=node)  # fmt: skip


def _to_transposed(editor: Editor, layer: Layer, node: fx.Node) -> Action | None:
    """None where no shuffle reads the layer."""
    found = transposed_form(editor, node)
    if found is None:
        return None
    if isinstance(found, str):
        return Action.left(layer.name, found)
    given = arguments(node)
    weight = stored(editor, given["weight"], lambda _: found.weight)
    bias = None
    if given["bias"] is not None:
        bias = stored(editor, given["bias"], lambda b: _first_phases(b, found.phases))
    new = editor.call(
        TRANSPOSED[len(found.stride)], found.source, weight, bias, list(found.stride),
        list(found.padding), list(found.output_padding), found.groups,
        before=found.last, like=node,
    )  # fmt: skip
    editor.replace(found.last, new)
    return Action(layer.name, "transposed convolution")


def _first_phases(bias: Tensor, phases: int) -> Tensor:
    return bias[::phases]
