"""The programs of a bundle: graphs cut out of one program, which share its tensors."""

from __future__ import annotations

from graphwright.ir.edit import Editor
from graphwright.ir.program import Program
from graphwright.ir.sampling.cached import handing_out, shallow
from graphwright.ir.sampling.record import DENOISED, NOISE, Denoiser
from graphwright.ir.sampling.surgery import half_of, is_joined, with_outputs
from graphwright.ir.sampling.tokens import without_push

FULL = "full"
"""The whole program."""

CONDITIONED = "conditioned"
"""The network with the condition alone, where guidance is off."""

STILL = "_still"
"""Behind the name of one without the push of sample.negtome."""

SHALLOW = "_shallow"
"""Behind the name of one that takes over what an earlier step kept."""


def variants(program: Program) -> dict[str, Program]:
    """Programs by name; the whole one alone where every step is guided and nothing reused."""
    record = Denoiser.of(program)
    found = {FULL: program}
    if record is not None and record.guidance is not None and record.guidance.may_rest:
        found[CONDITIONED] = conditioned(program)
    if record is not None and "push" in record.settings:
        found |= {name + STILL: without_push(made) for name, made in found.items()}
    if record is None or not record.cached:
        return found
    deep = {name: handing_out(made, record) for name, made in found.items()}
    return {**deep, **{name + SHALLOW: shallow(made, record) for name, made in found.items()}}


def conditioned(program: Program) -> Program:
    """A guided program without its guidance: rows with the condition only.

    Inputs that are then not read are left out; outputs are D and E.
    """
    editor = Editor(program, by="sampling")
    wanted = {f"{name} with": name for name in (DENOISED, NOISE)}
    outputs = {}
    for node in list(editor.graph.nodes):
        if half_of(node) in wanted:
            outputs[wanted[half_of(node)]] = node.args[0]
    names = [spec.name for spec in program.signature.outputs]
    old = editor.graph.output_node().args[0]
    assert isinstance(old, tuple)
    kept = [DENOISED, NOISE]
    made = [outputs.get(name, old[names.index(name)]) for name in kept]
    editor.graph.output_node().args = (tuple(made),)
    for node in list(editor.graph.nodes):
        if is_joined(node):
            parts = node.args[0]
            assert isinstance(parts, (list, tuple))
            node.replace_all_uses_with(parts[0])
    editor.changed = True
    return with_outputs(editor, kept)
