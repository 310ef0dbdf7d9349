"""insert.wavelet_input: low-pass versions of the image beside an encoder's stages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import sympy
import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.utils._sympy.functions import FloorDiv

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.graph.sizes import expression_of
from graphwright.ir.layers.kinds import CONVOLUTIONS, INPUT_ARGUMENT, WEIGHT_ARGUMENT
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.modules.haar import HaarInput
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._form.places import (
    InsertOptions,
    apply_freeze,
    image_input,
    in_editor,
    seeded,
)

aten = torch.ops.aten
MOST_LEVELS = 8


class WaveletInputOptions(InsertOptions):
    """Options of insert.wavelet_input."""

    targets: Selector = ("*",)
    """Convolutions that read the end of an encoder stage: selector patterns over names and kinds.
    Of those, the ones with a stride that read a map of half the image or less get an input."""

    image: str | None = None
    """Name of the input that is the image; the only one when absent."""

    bands: Literal["approximation", "all"] = "approximation"
    """Bands of the last level: the low-pass alone, or all of them."""

    channels: Annotated[int, Field(ge=1)] | None = None
    """Channels that the bands are lifted to; as many as the stage has when absent."""


class WaveletInput(Pass[WaveletInputOptions]):
    """Gives the stages of a convolutional encoder a low-pass version of the image itself.

    A convolution with a stride that ends a stage reads the stage's map. Here it reads the Haar
    low-pass of the image at just that resolution too, lifted by one block, beside the map: its
    weight gets as many input columns more. These start at zero, so that the network is the same
    until it is trained. The first stage (full resolution) and the last one get nothing, as in the
    paper. The transform is a fixed convolution, so that the network still takes one image.

    Source: P54, multi-scale wavelet inputs. (The released code computes the bands in the data
    loader and trains from scratch.)
    """

    papers = ("P54",)
    contract: ClassVar[Contract] = "identity_at_init"
    weights: ClassVar[Effect | None] = "kept"

    def run(self, program: Program, context: Context) -> Result:
        """Adds an input to every chosen convolution that can have one.

        Raises:
            ModelError: the image is not clear, or no chosen convolution can have an input.
        """
        editor = Editor(program, by=self.id)
        image = in_editor(editor, image_input(program, self.options.image, self.id))
        actions = []
        for layer in select(program, self.options.targets, CONVOLUTIONS):
            call = in_editor(editor, layer.node)
            found = _halvings(layer, call, image)
            if isinstance(found, str):
                actions.append(Action.left(layer.name, found))
            else:
                actions.append(self._insert(editor, layer, call, image, *found, context))
        if not any(action.changed for action in actions):
            why = tuple(sorted({f"{a.layer}: {a.reason}" for a in actions}))
            raise ModelError(
                "insert.wavelet_input: no chosen convolution ends a stage of an encoder",
                details=why[:5],
            )
        apply_freeze(editor, self.options.freeze)
        return Result(editor.finish(), tuple(actions))

    def _insert(
        self, editor: Editor, layer: Layer, call: fx.Node, image: fx.Node,
        halvings: tuple[int, ...], round_up: bool, context: Context,
    ) -> Action:  # fmt: skip
        index = INPUT_ARGUMENT[layer.kind]
        source: Any = call.args[index]
        value: Tensor = source.meta["val"]
        added = self.options.channels or int(value.shape[1])
        bands = self.options.bands == "all"
        module = seeded(
            HaarInput, context.generator(layer.name), int(image.meta["val"].shape[1]), halvings,
            added, bands, round_up,
        ).to(value.dtype)  # fmt: skip
        (extra,) = graft(editor, module, image, name=f"{layer.name}.wavelet", before=call)
        joined = editor.call(aten.cat.default, [source, extra], 1, before=call)
        stored = editor.state[layer.weight]
        zeros = stored.new_zeros(stored.shape[0], added, *stored.shape[2:])
        wide = torch.cat([stored.detach(), zeros], 1)
        is_parameter = isinstance(stored, nn.Parameter)
        editor.set_state(
            layer.weight, nn.Parameter(wide, stored.requires_grad) if is_parameter else wide
        )
        call.update_arg(index, joined)
        editor.changed = True
        levels = " x ".join(str(2**times) for times in halvings)
        return Action(layer.name, f"reads {added} channels of the image / ({levels})")


def _halvings(layer: Layer, call: fx.Node, image: fx.Node) -> tuple[tuple[int, ...], bool] | str:
    """How often each axis of the image is halved in what a convolution reads, and whether upwards;
    or why it gets no input."""
    source: Any = call.args[INPUT_ARGUMENT[layer.kind]]
    weight: Any = call.args[WEIGHT_ARGUMENT[layer.kind]]
    strides: Any = call.args[3] if len(call.args) > 3 else [1]
    if all(step == 1 for step in strides):
        return "it has no stride"
    if not layer.weight or len(weight.users) > 1:
        return "its weight is shared, or in a compressed form"
    if int(weight.meta["val"].shape[1]) != int(source.meta["val"].shape[1]):
        return "it has groups"
    small, large = source.meta["val"].shape[2:], image.meta["val"].shape[2:]
    if len(small) != len(large):
        return "it reads no map of the image's axes"
    for round_up in (True, False):
        found = [_times_halved(a, b, round_up) for a, b in zip(small, large, strict=True)]
        halvings = tuple(times for times in found if times is not None)
        if len(halvings) == len(found):
            if not max(halvings):
                return "it reads a map of the image's own size"
            return halvings, round_up
    return "it reads a map whose size is not the image's, halved"


def _times_halved(small: Any, large: Any, round_up: bool) -> int | None:
    """n where `small` is `large` halved n times, at every size that the program takes."""
    wanted, size = expression_of(small), expression_of(large)
    for times in range(MOST_LEVELS + 1):
        if sympy.simplify(wanted - size) == 0:
            return times
        size = FloorDiv(size - 1, 2) + 1 if round_up else FloorDiv(size, 2)
    return None
