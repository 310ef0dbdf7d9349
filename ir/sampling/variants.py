"""The programs of a bundle: graphs cut out of one program, which share its tensors."""

from __future__ import annotations

from dataclasses import replace

from graphwright.ir.edit import Editor
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import DENOISED, NOISE, Denoiser
from graphwright.ir.sampling.surgery import half_of, is_joined

FULL = "full"
"""The whole program."""

CONDITIONED = "conditioned"
"""The network with the condition alone, where guidance is off."""


def variants(program: Program) -> dict[str, Program]:
    """Programs by name; the whole one alone where every step is guided."""
    record = Denoiser.of(program)
    found = {FULL: program}
    if record is not None and record.guidance is not None and record.guidance.may_rest:
        found[CONDITIONED] = conditioned(program)
    return found


def conditioned(program: Program) -> Program:
    """A guided program without its guidance: rows with the condition only.

    Inputs that are then not read are left out; outputs are D and E, and what the record keeps.
    """
    record = Denoiser.required(program, "variants")
    editor = Editor(program, by="sampling")
    wanted = {f"{name} with": name for name in (DENOISED, NOISE)}
    outputs = {}
    for node in list(editor.graph.nodes):
        if half_of(node) in wanted:
            outputs[wanted[half_of(node)]] = node.args[0]
    names = [spec.name for spec in program.signature.outputs]
    old = editor.graph.output_node().args[0]
    assert isinstance(old, tuple)
    kept = [DENOISED, NOISE, *record.cached]
    made = [outputs.get(name, old[names.index(name)]) for name in kept]
    editor.graph.output_node().args = (tuple(made),)
    for node in list(editor.graph.nodes):
        if is_joined(node):
            parts = node.args[0]
            assert isinstance(parts, (list, tuple))
            node.replace_all_uses_with(parts[0])
    editor.changed = True
    return _with_outputs(editor, kept)


def _with_outputs(editor: Editor, kept: list[str]) -> Program:
    """The edited program with these of its outputs, and only the inputs that are read."""
    editor.graph.eliminate_dead_code()
    unread = []
    for node in editor.graph.find_nodes(op="placeholder"):
        if not node.users:
            unread.append(str(node.target))
            editor.graph.erase_node(node)
    program = editor.finish(propagate=True)
    old = program.signature
    specs = {spec.name: spec for spec in old.outputs}
    pairs = [
        (spec, example)
        for spec, example in zip(old.inputs, program.examples, strict=True)
        if spec.name not in unread
    ]
    signature = replace(
        old,
        inputs=tuple(spec for spec, _ in pairs),
        outputs=tuple(specs[name] for name in kept),
        structure={"dict": {name: {"leaf": i} for i, name in enumerate(kept)}},
        state=tuple(name for name in old.state if name not in unread),
    )
    examples = tuple(example for _, example in pairs)
    return program.replace(signature=signature, examples=examples)
