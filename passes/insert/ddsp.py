"""insert.ddsp: a learned reverberation behind a network's audio."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.modules.ddsp import FirReverb
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._form.places import InsertOptions, apply_freeze


class DdspOptions(InsertOptions):
    """Options of insert.ddsp."""

    module: Literal["reverb"] = "reverb"
    """What goes behind the audio. Oscillator and noise make audio out of controls, which no trained
    network without them gives: they are modules for a model of one's own."""

    output: str | None = None
    """Name of the output that is audio (batch, samples); the only one when absent."""

    taps: Annotated[int, Field(ge=2)] = 48000
    """Length of the response, in samples; 3 seconds at 16 kHz as published."""


class Ddsp(Pass[DdspOptions]):
    """Puts a room behind a network that gives audio: audio + audio * h, with a learned response h.

    h starts at zero, where the network is the same (the released code draws it from a normal
    distribution of deviation 1e-6); its first tap stays zero, for the dry sound has a path of its
    own. Up to 512 taps it is one convolution, beyond that a product in Fourier space by blocks of a
    fixed size, so that the length of the audio may be free.

    Source: P62, section 3.5 (reverberation). Harmonic oscillator and filtered noise (sections 3.2
    and 3.4) are modules: `graphwright.ir.modules.ddsp`.
    """

    papers = ("P62",)
    contract: ClassVar[Contract] = "identity_at_init"
    weights: ClassVar[Effect | None] = "kept"

    def run(self, program: Program, context: Context) -> Result:
        """Inserts it.

        Raises:
            ModelError: no single output is audio (batch, samples).
        """
        options = self.options
        index = _audio(program, options.output)
        editor = Editor(program, by=self.id)
        end = editor.graph.output_node()
        outputs: Any = end.args[0]
        audio: fx.Node = outputs[index]
        module = FirReverb(options.taps).to(audio.meta["val"].dtype)
        (heard,) = graft(editor, module, audio, name="reverb", before=end)
        end.args = ((*outputs[:index], heard, *outputs[index + 1 :]),)
        apply_freeze(editor, options.freeze)
        name = program.signature.outputs[index].name
        return Result(editor.finish(), (Action(name, f"reverberation of {options.taps} taps"),))


def _audio(program: Program, name: str | None) -> int:
    outputs: Any = program.graph.output_node().args[0]
    names = [spec.name for spec in program.signature.outputs]
    found = [
        index for index, node in enumerate(outputs)
        if name in (None, names[index]) and _is_audio(node.meta.get("val"))
    ]  # fmt: skip
    if len(found) != 1:
        raise ModelError(
            f"insert.ddsp: {len(found)} outputs are audio (batch, samples) in floating point",
            fix=f"Name one with `output`; the outputs are {', '.join(names)}.",
        )
    return found[0]


def _is_audio(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
