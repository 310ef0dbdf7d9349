"""insert.blind_spot: convolutions that do not see the pixel they stand on."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import full_arguments, gw_meta, set_gw_meta
from graphwright.ir.layers.kinds import CONVOLUTIONS, KINDS, WEIGHT_ARGUMENT
from graphwright.ir.layers.selectors import select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._blind.offsets import Window, is_window, offsets, read_of
from graphwright.passes.insert._form.places import image_input, in_editor

aten = torch.ops.aten
MARK = "blind_spot"
"""Entry on the product of a weight and its mask."""


class BlindSpotOptions(Bounded):
    """Options of insert.blind_spot."""

    targets: Selector = ("*",)
    """Convolutions that may be masked: selector patterns over names and kinds. Of those, the first
    on every way from the image whose kernel is larger than one are."""

    blind: bool = True
    """Mask the middle of the kernels; or take the masks away, so that the same weights, with the
    middle that they have kept, see the pixel again."""

    dilate: bool = True
    """Dilate the convolutions behind a masked one, so that they do not bring the pixel back: by
    (k + 1) / 2, where k is the masked kernel. Without it, a network that would see it is
    refused."""


class BlindSpot(Pass[BlindSpotOptions]):
    """Makes a conditional blind-spot network of a plain one.

    A value of the output then depends on the pixels around its place and not on that pixel, which
    lets a denoiser learn from noisy images alone. The first larger convolutions on the ways from
    the image lose the middle of their kernels; those behind get a dilation. The weights keep their
    middle beside the mask: `blind: false` later in a chain (behind training) takes the masks away,
    which gives the network that is used. `cleanup.fold_constants` stores masked kernels, so that
    artifacts of either have plain convolutions.

    Blindness is proved: offsets at which every value reads the image are computed through the whole
    graph, and a network in which one output would see its pixel is refused, with the node.

    Source: P05, section 3.3. The network there has two branches, masked 3 x 3 before dilations of 2
    and masked 5 x 5 before dilations of 3.
    """

    papers = ("P05",)
    contract: ClassVar[Contract] = "lossy"
    weights: ClassVar[Effect | None] = "reformed"

    def run(self, program: Program, context: Context) -> Result:
        """Puts the masks in, or takes them out.

        Raises:
            ModelError: the network would still see the pixel, or it cannot be shown that it does
                not; there are no masks to take out, or there are some already.
        """
        editor = Editor(program, by=self.id)
        there = [node for node in editor.graph.nodes if gw_meta(node).get(MARK)]
        if not self.options.blind:
            return _uncovered(editor, there)
        if there:
            raise ModelError("insert.blind_spot: the network is blind already")
        image = in_editor(editor, image_input(program, None, self.id))
        actions: dict[fx.Node, Action] = {}
        masked = self._chosen(editor, program, actions)
        if self.options.dilate:
            for node, by in _needed(editor.graph, masked).items():
                _dilate(node, by)
                name = _name(program, node)
                actions[node] = Action(name, f"dilated by {' x '.join(map(str, by))}")
                editor.changed = True
        _refuse_sight(editor.graph, image, masked)
        for node in masked:
            self._mask(editor, node, _name(program, node))
        return Result(editor.finish(), tuple(actions.values()), {"masked": float(len(masked))})

    def _chosen(
        self, editor: Editor, program: Program, actions: dict[fx.Node, Action]
    ) -> set[fx.Node]:
        masked: set[fx.Node] = set()
        for layer in select(program, self.options.targets, CONVOLUTIONS):
            node = in_editor(editor, layer.node)
            window = Window(node)
            if max(window.kernel) == 1:
                continue
            if reason := window.refusal or _seen_before(node):
                actions[node] = Action.left(layer.name, reason)
            else:
                masked.add(node)
                actions[node] = Action(layer.name, "its middle is masked")
        return masked

    def _mask(self, editor: Editor, call: fx.Node, name: str) -> None:
        index = WEIGHT_ARGUMENT[KINDS[call.target]]
        weight: Any = call.args[index]
        value = weight.meta["val"]
        kernel = [int(k) for k in value.shape[2:]]
        mask = torch.ones(1, 1, *kernel, dtype=value.dtype)
        mask[(0, 0, *(k // 2 for k in kernel))] = 0
        stored = editor.get(editor.add_state(f"{name}.blind_mask", mask))
        product = editor.call(aten.mul.Tensor, weight, stored, before=call)
        set_gw_meta(product, **{MARK: True})
        call.update_arg(index, product)


def _uncovered(editor: Editor, there: list[fx.Node]) -> Result:
    """The network without its masks."""
    if not there:
        raise ModelError(
            "insert.blind_spot: the network has no masks to take away",
            fix="Put `insert.blind_spot` without `blind: false` in front; a pass that stores "
            "weights anew (quantize, cleanup.fold_constants) makes masks a part of them.",
        )
    actions = []
    for product in there:
        weight: Any = product.args[0]
        actions.append(Action(str(weight.target).rpartition(".")[0], "sees its middle again"))
        editor.replace(product, weight)
    return Result(editor.finish(), tuple(actions))


def _name(program: Program, node: fx.Node) -> str:
    from graphwright.ir.layers.selectors import layers

    return next(layer.name for layer in layers(program) if layer.node.name == node.name)


def _seen_before(node: fx.Node) -> str:
    """Why a convolution is not the first one on its ways from the image."""
    stack, seen = [read_of(node)], set()
    while stack:
        source = stack.pop()
        if source in seen:
            continue
        seen.add(source)
        if is_window(source) and max(Window(source).kernel) > 1:
            return f"{source.name} stands in front of it"
        stack.extend(source.all_input_nodes)
    return ""


def _needed(graph: fx.Graph, masked: set[fx.Node]) -> dict[fx.Node, tuple[int, ...]]:
    """Dilations of the convolutions behind masked ones, by axis, where they are not there yet."""
    steps: dict[fx.Node, tuple[int, ...]] = {}
    found: dict[fx.Node, tuple[int, ...]] = {}
    for node in graph.nodes:
        reads = [steps[source] for source in node.all_input_nodes if source in steps]
        own = [tuple((k + 1) // 2 for k in Window(node).kernel)] if node in masked else []
        if not (reads or own):
            continue
        steps[node] = tuple(math.lcm(*axis) for axis in zip(*reads, *own, strict=True))
        if node in masked or not is_window(node):
            continue
        window = Window(node)
        wanted = tuple(
            d if k == 1 else -(-d // step) * step
            for k, d, step in zip(window.kernel, window.dilation, steps[node], strict=True)
        )
        if wanted != window.dilation:
            found[node] = wanted
    return found


def _dilate(node: fx.Node, by: tuple[int, ...]) -> None:
    window = Window(node)
    arguments, _ = full_arguments(node)
    arguments[5] = list(by)
    if not isinstance(window.padding, str):
        arguments[4] = [d * (k // 2) for d, k in zip(by, window.kernel, strict=True)]
    node.args, node.kwargs = tuple(arguments), {}


def _refuse_sight(graph: fx.Graph, image: fx.Node, masked: set[fx.Node]) -> None:
    found = offsets(graph, image, masked)
    here = (0,) * (image.meta["val"].dim() - 2)
    for output in graph.output_node().all_input_nodes:
        if here not in found.get(output, ()):
            continue
        node = output
        while sources := [s for s in node.all_input_nodes if here in found.get(s, ())]:
            node = sources[0]
        what = (
            "reads the image beside every masked convolution" if node is image
            else f"brings it back with a dilation of {Window(node).dilation}"
            if is_window(node) else "brings it back"
        )  # fmt: skip
        culprit = next(iter(image.users)) if node is image else node
        raise ModelError(
            f"insert.blind_spot: the output {output.name!r} would see its own pixel: "
            f"{culprit.name!r} {what}",
            where=str(gw_meta(culprit).get("source") or ""),
            fix="Mask more convolutions (`targets`), allow `dilate`, or take the skip away.",
        )
