"""insert.resampler: reads the image anew, at learned places, in front of a classifier."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graphwright.ir.edit import Editor
from graphwright.ir.graft import graft
from graphwright.ir.modules.resampler import Resampler as Module
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._form.places import (
    InsertOptions,
    apply_freeze,
    behind,
    image_input,
    in_editor,
    replace_but,
    seeded,
)


class ResamplerOptions(InsertOptions):
    """Options of insert.resampler."""

    image: str | None = None
    """Name of the input that is the image, with values in [0, 1]; the only one when absent."""

    width: Annotated[int, Field(ge=1)] = 64
    """Channels of the encoder."""

    blocks: Annotated[int, Field(ge=0)] = 16
    """Residual blocks of the encoder."""

    trains: Literal["all", "sampler"] = "all"
    """What of the front end is trained: all of it, or, as in the paper's second stage, the sampler
    alone, behind a frozen encoder and image function."""


class Resampler(Pass[ResamplerOptions]):
    """Puts a front end before a network that reads its image anew, which takes attacks out of it.

    An encoder finds features; a sampler gives every pixel a shift, and an implicit image function
    the colour at the shifted place, from the four pixels around it. The place's mixture weights are
    the areas opposite to the corners, the same as linear interpolation; at the border the last
    pixel is repeated (the released code averages two rows there).

    The image function gives the change of the image's own colour, and both networks start at zero:
    the network is the same until it is trained. The paper trains the function to give the colour
    itself, which cannot start so.

    Source: P18, sections 3.2 and 3.3.
    """

    papers = ("P18",)
    contract: ClassVar[Contract] = "identity_at_init"
    weights: ClassVar[Effect | None] = "kept"

    def run(self, program: Program, context: Context) -> Result:
        """Inserts it.

        Raises:
            ModelError: the image is not clear.
        """
        options = self.options
        editor = Editor(program, by=self.id)
        image = in_editor(editor, image_input(program, options.image, self.id, axes=(4,)))
        value = image.meta["val"]
        channels = int(value.shape[1])
        module = seeded(
            Module, context.generator("resampler"), channels, options.width, options.blocks
        ).to(value.dtype)
        if options.trains == "sampler":
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.startswith("sampler."))
        (read,) = graft(editor, module, image, name="resampler", before=behind(image))
        replace_but(editor, image, read)
        apply_freeze(editor, options.freeze)
        size = sum(p.numel() for p in module.parameters())
        action = Action(image.name, f"read anew at learned places, {size:,} parameters")
        return Result(editor.finish(), (action,), {"inserted_parameters": float(size)})
