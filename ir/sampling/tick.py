"""One tick of a stream as a graph (P87): frames in, every slot one step further, a frame out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import (
    ALPHA,
    DENOISED,
    FACT,
    NEGATIVE,
    SIGMA,
    STREAM,
    Denoiser,
    Guidance,
)
from graphwright.ir.sampling.schedule import SMALLEST
from graphwright.ir.sampling.slots import NOISES, Enter, Leave, Slots
from graphwright.ir.sampling.solvers.table import SOLVERS
from graphwright.ir.sampling.surgery import Interface, NewInput, with_outputs
from graphwright.ir.signature import TensorSpec

aten = torch.ops.aten


def ticking(
    program: Program, slots: Slots, by: str, numbers: dict[str, float], steps: Sequence[float]
) -> Program:
    """One tick out of a denoiser.

    Its inputs are `frame` under the name of the denoiser's sample, the conditions of the frames,
    `negative_<condition>` where guidance needs one and no number stands for it, `noises`, the
    states, and the parameters; its outputs the frame that is done (`denoised`) and the states.

    Raises:
        ModelError: guidance in the program already, a fixed batch, a condition without rows, no
            condition to lead away from, or one time for all rows.
    """
    record = Denoiser.required(program, by)
    _refuse(program, record, slots, by)
    edit = Interface(program, by)
    frame, spec = edit.input(record.sample), edit.spec(record.sample)

    def more(name: str, count: int) -> fx.Node:
        shape = (count, *frame.meta["val"].shape)
        example = torch.zeros(count, *edit.example(record.sample).shape)
        new = TensorSpec(name, spec.dtype, (count, *spec.shape))
        return edit.add_input(NewInput(new, example.to(frame.meta["val"].dtype)), sizes=shape)

    negatives = {
        name: edit.add_negative(name, fill) if slots.more else None
        for name, fill in record.conditions.items()
    }
    noises = more(NOISES, slots.count)
    states = [more(name, slots.count - 1) for name in slots.states]
    given = [edit.add_number(name, numbers[name]) for name in slots.parameters]
    _enter(edit, record, slots, negatives, [noises, *states[:1]], by)
    edit.propagate()
    done = _leave(edit, slots, spec, [frame, noises, *states, *given], by)
    shapes = [spec.shape, *((slots.count - 1, *spec.shape) for _ in states)]
    names = [DENOISED, *(f"next_{name}" for name in slots.states)]
    edit.set_outputs(list(zip(names, done, shapes, strict=True)))
    edit.editor.facts[FACT] = record.replace(
        guidance=Guidance(
            by, {n: numbers[n] for n in slots.parameters},
            {STREAM: {"steps": list(steps), "guidance": slots.mode}}, False,
            tuple(NEGATIVE + name for name, node in negatives.items() if node is not None),
        )
    ).to_json()  # fmt: skip
    return _without_unread(edit.finish(), names, by)


def _enter(
    edit: Interface, record: Denoiser, slots: Slots, negatives: dict[str, fx.Node | None],
    held: list[fx.Node], by: str,
) -> None:  # fmt: skip
    """Gives the network the rows of all slots in the place of the frame, its levels and time, and
    every condition once for each of them, what is led away from behind them."""
    editor, frame = edit.editor, edit.input(record.sample)
    read = [record.sample, ALPHA, SIGMA, *([record.time] if record.time else [])]
    readers = {name: list(edit.input(name).users) for name in (*read, *record.conditions)}
    first = next(n for n in editor.graph.nodes if n.op == "call_function")
    enter = Enter(slots, _time_dtype(edit.program, record), frame.meta["val"].dtype)
    made = graft(editor, enter, frame, *held, name=f"{by}.enter", before=first)
    for name, node in zip(read, made, strict=True):
        for reader in readers[name]:
            reader.replace_input_with(edit.input(name), node)
    for name in record.conditions:
        node = edit.input(name)
        other = _away(edit, record, name, negatives[name], first) if slots.more else node
        parts = [node] * slots.count + [other] * slots.more
        joined = editor.call(aten.cat.default, parts, 0, before=first)
        for reader in readers[name]:
            reader.replace_input_with(node, joined)


def _leave(
    edit: Interface, slots: Slots, spec: TensorSpec, held: list[fx.Node], by: str
) -> tuple[fx.Node, ...]:
    """The frame that is done, and the next states, out of the network's rows."""
    editor, frame = edit.editor, held[0]
    sizes = [editor.call(aten.sym_size.int, frame, axis, before=edit.output)
             if isinstance(size, str) else int(size)
             for axis, size in enumerate(spec.shape)]  # fmt: skip
    (out,) = edit.outputs[1:]
    noise = editor.call(aten.reshape.default, out, [slots.count + slots.more, *sizes],
                        before=edit.output)  # fmt: skip
    leave = Leave(slots, len(spec.shape), frame.meta["val"].dtype)
    return tuple(graft(editor, leave, noise, *held, name=f"{by}.leave", before=edit.output))


def _without_unread(program: Program, outputs: list[str], by: str) -> Program:
    """The levels and the time are constants now, and no inputs."""
    from graphwright.ir.edit import Editor

    editor = Editor(program, by=by)
    editor.changed = True
    return with_outputs(editor, outputs)


def _refuse(program: Program, record: Denoiser, slots: Slots, by: str) -> None:
    _refuse_steps(record, by)
    specs = {spec.name: spec for spec in program.signature.inputs}
    batch = specs[record.sample].shape[0]
    if not isinstance(batch, str):
        raise ModelError(
            f"{by}: the batch is fixed at {batch}, and a tick asks about {slots.count} frames",
            fix="Trace the model with a free batch (`shape: [batch, ...]` in the spec).",
        )
    if record.time is not None and specs[record.time].shape != (batch,):
        raise ModelError(
            f"{by}: the network is told one time for all rows, and slots have their own",
            fix="Trace it with a time of shape [batch].",
        )
    for name in record.conditions:
        if specs[name].shape[:1] != (batch,):
            raise ModelError(f"{by}: the condition {name!r} has no row per sample")
    if slots.more and record.distilled is not None:
        raise ModelError(
            f"{by}: the network was distilled from guided predictions and takes their scale as "
            f"{record.distilled!r}; it has no prediction without the condition",
            fix="Choose `none` or `self`.",
        )
    if slots.more and not record.conditions:
        raise ModelError(f"{by}: guidance {slots.mode} leads away from no condition, and there is "
                         "none to leave out", fix="Choose `none` or `self`.")  # fmt: skip
    dtype = _time_dtype(program, record)
    if dtype is not None and not dtype.is_floating_point:
        part = [t for t in slots.time if abs(t - round(t)) > SMALLEST]
        if part:
            raise ModelError(f"{by}: the network takes whole steps, and {part[0]:g} is none")


def _refuse_steps(record: Denoiser, by: str) -> None:
    """A tick does all steps at once, each by itself."""
    if record.guidance is not None:
        raise ModelError(
            f"{by}: a stream guides by itself, and {record.guidance.by} is in the program",
            fix="Leave it out, and choose the stream's `guidance`.",
        )
    if record.settings:
        raise ModelError(
            f"{by}: a pass of sample makes some steps differ here, and a tick does all at once",
            details=tuple(record.settings),
            fix="Leave that pass out.",
        )
    if record.latent:
        raise ModelError(f"{by}: this denoiser has a latent in every call, and a stream draws none",
                         fix="Leave tune.ddgan out.")  # fmt: skip
    carried = SOLVERS[record.solver].state
    if carried:
        raise ModelError(
            f"{by}: a stream steps as consistency models do, every slot by itself, and "
            f"{record.solver} carries {', '.join(carried)} from step to step",
            fix="Say another `solver` in sample.denoiser (lcm, euler).",
        )


def _time_dtype(program: Program, record: Denoiser) -> torch.dtype | None:
    if record.time is None:
        return None
    spec = next(spec for spec in program.signature.inputs if spec.name == record.time)
    found: torch.dtype = getattr(torch, spec.dtype)
    return found


def _away(
    edit: Interface, record: Denoiser, name: str, negative: fx.Node | None, before: fx.Node
) -> fx.Node:
    if negative is not None:
        return negative
    fill = record.conditions[name]
    assert fill is not None
    value = fill if edit.spec(name).dtype.startswith("float") else int(fill)
    return edit.editor.call(aten.full_like.default, edit.input(name), value, before=before)
