"""From an `nn.Module` to a Program."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from graphwright.ir.canonical.normalize import canonicalize
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.arrange import arranged
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.mode import drops
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange
from graphwright.ir.trace.archived_guards import archived_guards
from graphwright.ir.trace.assemble import assemble, with_own_outputs
from graphwright.ir.trace.attention_dropout import note_attention_dropout
from graphwright.ir.trace.calling import Call, FlatModel
from graphwright.ir.trace.check import (
    AS_NUMBER,
    agrees,
    apply_guards,
    batch_axes,
    check_against_model,
    narrowed_by_torch,
)
from graphwright.ir.trace.derived import Derived
from graphwright.ir.trace.dims import (
    Dynamic,
    dim_names,
    example_sizes,
    normalize,
    shapes_for_export,
    specialized,
    traceable_examples,
    without,
)
from graphwright.ir.trace.errors import explain
from graphwright.ir.trace.guards import Guard, guards_of
from graphwright.ir.trace.prepare import quiet, traceable
from graphwright.ir.trace.size_places import noted_places
from graphwright.ir.trace.state import carried_over, frozen_note, state_of
from graphwright.ir.trace.symbolic_numbers import symbolic_numbers
from graphwright.ir.trace.untouched import same_attributes

__all__ = ["Dynamic", "TraceWarning", "trace"]

LARGER = 3
"""Added to the example's sizes where a trace at those gives up a dimension."""


class TraceWarning(UserWarning):
    """Tracing gave something up: a free dimension, an output that is no tensor."""


def trace(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic: Dynamic | Literal["batch"] | None = None,
    *,
    dims: Mapping[str, DimRange] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    check: bool = True,
    state: Literal["frozen", "explicit"] = "frozen",
    derived: Mapping[str, str] | None = None,
    call: Call | None = None,
) -> Program:
    """Traces a model in inference mode with `torch.export`.

    The model is left as it was. What had to be given up on the way is warned about, and listed in
    `program.facts["trace"]["notes"]`.

    Args:
        model: the trained model.
        example_inputs: positional arguments, or arguments by name. Tensors become inputs; other
            values are baked in.
        dynamic: for each input, which axes are free and under what name; the same name in two
            inputs is the same size. A dimension that the model fixes becomes static. "batch"
            frees the first axis of all inputs if the model runs at another size of it.
        dims: ranges of free dimensions; [1, unbounded) where absent.
        ranges: half-open range of sensible values per input.
        check: run the model and the program on the examples and at other sizes of the free
            dimensions; a dimension at which they differ becomes static.
        state: what becomes of tensors that the model writes as it runs and reads at its next call.
            Frozen, every call of the program is the first one; explicit, they are inputs behind
            the model's own, and the program returns its result and a dict of their new values.
        derived: free dimensions that follow from others: `{"total": "past + seq"}`.
        call: `call(model, **inputs)`, where the inputs are none of the model's own arguments.

    Raises:
        ModelError: the model cannot be traced; names the line of the model's own code.
        ArgumentError: `dynamic` names an input, an axis or a size that is not there.
    """
    flat = FlatModel(model, example_inputs, call)
    with traceable(model) as said:
        flat.settle()
        noted = _take_state(flat, state)
        asked = batch_axes(flat) if dynamic == "batch" else dynamic
        wanted: Dynamic = normalize(flat.inputs, asked or {})
        flat.derived = Derived(derived or {}, example_sizes(flat.inputs, wanted)).checked()
        program, notes = _right_at_every_size(flat, wanted, dict(dims or {}), ranges or {}, check)
    notes = [*noted, *said, *notes]
    for name, kind in flat.record.dropped.items():
        notes.append(f"output {name!r} is a {kind}, which holds no tensors; it is left out")
    for note in notes:
        warnings.warn(note, TraceWarning, stacklevel=2)
    program = arranged(program)
    if not notes:
        return program
    facts = {**program.facts.get("trace", {}), "notes": notes}
    return program.replace(facts={**program.facts, "trace": facts})


def _take_state(flat: FlatModel, state: str) -> list[str]:
    """Makes the model's state inputs and outputs, or says that it is frozen."""
    inputs = tuple(flat.inputs.values())
    try:
        writes = carried_over(flat.model, flat, inputs)
    except Exception:
        return []  # what does not run is told of where it is traced
    if not writes:
        return []
    if state == "frozen":
        return [frozen_note(writes.names())]
    flat.take_state(state_of(flat.model, writes, flat, inputs))
    return []


def _right_at_every_size(
    flat: FlatModel,
    wanted: Dynamic,
    dims: Mapping[str, DimRange],
    ranges: Mapping[str, tuple[float, float]],
    check: bool,
) -> tuple[Program, list[str]]:
    """A program whose free dimensions are right all over their ranges, and what was given up.

    Where a dimension is lost because the model's code makes a number of it, the model is traced
    once more with these numbers kept as sizes, and once more at larger sizes: a model that keeps
    the size of its last call, to compare the next one with, may hold the example's; and operators
    of torch have shortcuts at small sizes.
    """
    best, notes = _settled(flat, wanted, dims, ranges, check)
    for keeps_sizes, larger_by in ((True, 0), (False, LARGER)):
        if not check or not any(AS_NUMBER in note for note in notes):
            break
        flat.keeps_sizes, flat.larger_by = keeps_sizes, larger_by
        try:
            other, said = _settled(flat, wanted, dims, ranges, check)
        except Exception:
            continue  # the code takes numbers, or these sizes, only
        finally:
            flat.keeps_sizes, flat.larger_by = False, 0
        if _freedom(other) > _freedom(best):
            best, notes = other, said
    return best, notes


def _freedom(program: Program) -> tuple[int, ...]:
    bounds = program.signature.dims.values()
    return len(bounds), sum(b.max is None for b in bounds), -sum(b.min for b in bounds)


def _settled(
    flat: FlatModel,
    wanted: Dynamic,
    dims: Mapping[str, DimRange],
    ranges: Mapping[str, tuple[float, float]],
    check: bool,
) -> tuple[Program, list[str]]:
    """One trace, checked, and repeated without the dimensions that have to be fixed.

    A dimension that has to be fixed is fixed in another trace, where others may have to follow.
    """
    notes: list[str] = []
    while True:
        program, wanted, guards = _capture(flat, wanted, dims, ranges, notes)
        sizes = example_sizes(flat.inputs, wanted)
        if check:
            verdict = check_against_model(program, flat, wanted, guards, dims)
        else:
            verdict = apply_guards(guards, sizes, program.signature.dims)
        if verdict.differs:
            wanted, note = _without_the_culprit(flat, wanted, dims, ranges)
            notes.append(note)
            continue
        found = {**program.signature.dims, **verdict.ranges}
        found |= flat.derived.ranges(found, dims)
        silent = [g for g in guards if not any(g.text in note for note in verdict.notes)]
        said = narrowed_by_torch(silent, sizes, dims, found)
        notes += [note for note in (*said, *verdict.notes) if note not in notes]
        if not verdict.fixed:
            return program.replace(signature=replace(program.signature, dims=found)), notes
        wanted = without(wanted, _followed(flat, verdict.fixed, wanted, notes))
        dims = {**dims, **{d: r for d, r in verdict.ranges.items() if d not in verdict.fixed}}


def _followed(
    flat: FlatModel, fixed: Collection[str], dynamic: Dynamic, notes: list[str]
) -> set[str]:
    """The fixed dimensions, with those that follow, which are noted."""
    out = flat.derived.with_followers(fixed, dim_names(dynamic))
    why = f"it follows from {', '.join(sorted(fixed))}"
    notes += [_note(dim, flat.derived.sizes[dim], why) for dim in sorted(out - set(fixed))]
    return out


def _without_the_culprit(
    flat: FlatModel,
    wanted: Dynamic,
    dims: Mapping[str, DimRange],
    ranges: Mapping[str, tuple[float, float]],
) -> tuple[Dynamic, str]:
    """Fixes a dimension that makes the program another one at the example's own sizes already.

    Code does that which asks what a size is written as, or of which type it is.

    Raises:
        ModelError: the program is another one with all dimensions fixed.
    """
    sizes = example_sizes(flat.inputs, wanted)
    names = dim_names(wanted)
    for given_up in [*({name} for name in reversed(names)), set(names)]:
        given_up = flat.derived.with_followers(given_up, names)
        trial = without(wanted, given_up)
        program, _, _ = _capture(flat, trial, dims, ranges, [])
        if names and agrees(program, flat):
            listed = " and ".join(f"{d!r} is fixed at {sizes[d]}" for d in names if d in given_up)
            why = "left free, it makes the trace another model (its size is used as text or type)"
            return trial, f"dimension {listed}: {why}"
    raise ModelError(
        "the traced program computes something else than the model",
        fix="Report this model; until then trace a part of it that agrees.",
    )


def _capture(
    flat: FlatModel,
    dynamic: Dynamic,
    dims: Mapping[str, DimRange],
    ranges: Mapping[str, tuple[float, float]],
    notes: list[str],
) -> tuple[Program, Dynamic, list[Guard]]:
    """A canonical program, the dimensions that stayed free, and the guards on them."""
    exported, dynamic = _export_as_free_as_possible(flat, dynamic, notes)
    fixed = specialized(exported, flat.inputs, dynamic, flat.places)
    if fixed:
        sizes = {d: n for d, n in example_sizes(flat.inputs, dynamic).items() if d in fixed}
        if flat.larger_by or any(size < 2 for size in sizes.values()):
            # It was traced at another size, and the model holds on to that: trace at the example's.
            exported, dynamic = _export_as_free_as_possible(
                flat, without(dynamic, _followed(flat, fixed, dynamic, notes)), notes
            )
        else:
            dynamic = without(dynamic, _followed(flat, fixed, dynamic, notes))
        for dim, size in sizes.items():
            place = f"{fixed[dim]}: " if fixed[dim] else ""
            notes.append(_note(dim, size, f"{place}{AS_NUMBER}"))
    program = assemble(
        exported, flat.model, flat.inputs, flat.record.structure,
        dynamic=dynamic, dims=dims, ranges=ranges, constants=flat.constants,
        derived=flat.derived.among(dim_names(dynamic)),
    )  # fmt: skip
    note_attention_dropout(program.graph, flat)
    dropping = [node for node in program.graph.nodes if drops(node)]
    if dropping:
        place = gw_meta(dropping[0]).get("source", "")
        note = f"node {dropping[0].name!r} ({place}) drops values in eval mode too: taken out"
        notes += [note] if note not in notes else []
    free = dim_names(dynamic)
    guards = [flat.derived.on_free(g, free) for g in guards_of(exported, flat.inputs, dynamic)]
    guards += archived_guards(flat, dynamic, guards)
    return with_own_outputs(canonicalize(program)), dynamic, guards


def _note(dim: str, size: int, why: str) -> str:
    return f"dimension {dim!r} is fixed at {size}: {why}"


def _export_as_free_as_possible(
    flat: FlatModel, dynamic: Dynamic, notes: list[str]
) -> tuple[torch.export.ExportedProgram, Dynamic]:
    """Exports; when a free dimension is in the way, gives up as few of them as needed.

    Raises:
        ModelError: the model cannot be traced at fixed sizes either.
    """
    try:
        return _export(flat, dynamic), dynamic
    except Exception as error:
        _run_eagerly(flat)
        first = explain(error)
    names = dim_names(dynamic)
    if not names:
        raise first
    try:
        static = _export(flat, {})
    except Exception as error:
        raise explain(error) from error
    given_up = set(names)
    chosen, kept = static, without(dynamic, given_up)
    for name in reversed(names) if len(names) > 1 else ():
        try:
            lost = flat.derived.with_followers({name}, names)
            trial = without(dynamic, lost)
            chosen, kept, given_up = _export(flat, trial), trial, lost
            break
        except Exception:
            continue
    sizes = example_sizes(flat.inputs, dynamic)
    where = f"{first.where}: " if first.where else ""
    notes += [_note(dim, sizes[dim], f"{where}{first.message}") for dim in names if dim in given_up]
    return chosen, kept


def _run_eagerly(flat: FlatModel) -> None:
    """Tells a model that does not run on the example inputs from one that cannot be traced."""
    try:
        flat.run(*flat.inputs.values())
    except Exception as error:
        raise explain(error, "the model does not run on the example inputs") from error


def _export(flat: FlatModel, dynamic: Dynamic) -> torch.export.ExportedProgram:
    examples = traceable_examples(flat.inputs, dynamic, flat.larger_by, flat.derived.sums)
    numbers = symbolic_numbers(flat.model) if flat.keeps_sizes else contextlib.nullcontext()
    # Stand-ins and counts that the traced call leaves in the model would be read by the next one.
    places: dict[str, str] = {}
    with quiet(), numbers, same_attributes(flat.model), noted_places(places):
        exported = torch.export.export(
            flat, tuple(examples.values()), dynamic_shapes=shapes_for_export(examples, dynamic)
        )
    flat.places = places  # an export puts back what is written into attributes meanwhile
    return exported
