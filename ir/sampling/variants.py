"""The programs of a bundle: graphs cut out of one program, which share its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graphwright.ir.edit import Editor
from graphwright.ir.program import Program
from graphwright.ir.sampling.beside import apart
from graphwright.ir.sampling.cached import handing_out, shallow
from graphwright.ir.sampling.record import DENOISED, FACT, NOISE, Denoiser
from graphwright.ir.sampling.surgery import half_of, is_joined, with_outputs
from graphwright.ir.sampling.tokens import without_push
from graphwright.ir.signature import Signature

FULL = "full"
"""The whole program."""

CONDITIONED = "conditioned"
"""The network with the condition alone, where guidance is off."""

STILL = "_still"
"""Behind the name of one without the push of sample.negtome."""

OTHER = "other_"
"""In front of the names of the programs of the network that takes the first steps."""

SWITCH = "switch"
"""Entry of the settings of a program with two networks."""

LOOK_UP = "look_up"
"""The table of an index: numbers of items to their vectors."""

RETRIEVE = "retrieve"
"""Entry of the settings of a program with an index."""

NEIGHBOURS, VECTORS = "neighbours", "vectors"
"""Input [batch, neighbours] and output [batch, neighbours, width] of its table."""

SHALLOW = "_shallow"
"""Behind the name of one that takes over what an earlier step kept."""


BESIDE = {SWITCH: OTHER + FULL, RETRIEVE: LOOK_UP}
"""By entry of the settings, the program that was put beside another one."""


def whole(record: Denoiser, signatures: Mapping[str, Signature]) -> Signature:
    """The interface of the one program that these were cut out of, by their names.

    What the first of them hands out for later steps is no output of that one.
    """
    main = signatures[FULL]
    inputs = list(main.inputs)
    outputs = [spec for spec in main.outputs if spec.name not in record.cached]
    for setting in (name for name in record.settings if name in BESIDE):
        other = signatures[BESIDE[setting]]
        known = {spec.name for spec in inputs}
        inputs += [spec for spec in other.inputs if spec.name not in known]
        outputs += [replace(spec, name=f"{setting}_{spec.name}") for spec in other.outputs]
    if outputs == list(main.outputs):
        return main
    structure = {"dict": {spec.name: {"leaf": i} for i, spec in enumerate(outputs)}}
    return replace(main, inputs=tuple(inputs), outputs=tuple(outputs), structure=structure)


def variants(program: Program) -> dict[str, Program]:
    """Programs by name; the whole one alone where every step is guided and nothing reused."""
    record = Denoiser.of(program)
    if record is not None and RETRIEVE in record.settings:
        own, table = apart(program, RETRIEVE)
        return {**variants(_without(own, record, RETRIEVE)), LOOK_UP: table}
    if record is not None and SWITCH in record.settings:
        own, other = networks(program)
        return {**variants(own), **{OTHER + n: made for n, made in variants(other).items()}}
    found = {FULL: program}
    if record is not None and record.guidance is not None and record.guidance.may_rest:
        found[CONDITIONED] = conditioned(program)
    if record is not None and "push" in record.settings:
        found |= {name + STILL: without_push(made) for name, made in found.items()}
    if record is None or not record.cached:
        return found
    deep = {name: handing_out(made, record) for name, made in found.items()}
    return {**deep, **{name + SHALLOW: shallow(made, record) for name, made in found.items()}}


def networks(program: Program) -> tuple[Program, Program]:
    """The two denoisers of a program of sample.switch: its own, and that of the first steps."""
    record = Denoiser.required(program, "sampling")
    own, other = apart(program, SWITCH)
    theirs = {**other.facts, FACT: record.settings[SWITCH]["record"]}
    return _without(own, record, SWITCH), other.replace(facts=theirs)


def _without(program: Program, record: Denoiser, setting: str) -> Program:
    """The program with a record that lacks a setting."""
    settings = {name: value for name, value in record.settings.items() if name != setting}
    facts = {**program.facts, FACT: record.replace(settings=settings).to_json()}
    return program.replace(facts=facts)


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
