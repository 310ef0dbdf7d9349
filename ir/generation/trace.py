"""From a causal language model to a Program with its cache as inputs and outputs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.check.decode import (
    ROUNDINGS,
    by_model,
    distance,
    in_steps,
    texts,
)
from graphwright.ir.check.precision import roundoff
from graphwright.ir.generation.concat import runner_of
from graphwright.ir.generation.decoder import CACHES, Decoder, DecoderCall, NoCache, examine
from graphwright.ir.generation.model_facts import ModelFacts
from graphwright.ir.generation.record import FACT, Generation
from graphwright.ir.generation.rotary import fixed_rotary
from graphwright.ir.generation.states import State
from graphwright.ir.program import Program
from graphwright.ir.signature import Default, DimRange
from graphwright.ir.trace.capture import TraceWarning, trace
from graphwright.ir.trace.check import TOLERANCE
from graphwright.ir.trace.prepare import traceable

DERIVED = {"total": "past + seq"}


def trace_decoder(
    model: nn.Module, *, folder: str | Path | None = None, seed: int = 0, check: bool = True
) -> Program:
    """Traces a causal language model of transformers with its cache of keys and values.

    Inputs are `input_ids` (batch, seq), `attention_mask` (batch, total) and `position_ids` (batch,
    seq) where the model takes them, int64, and per layer i `past_key_i`, `past_value_i` (batch,
    heads, past, head size), and `past_state_i_conv`, `past_state_i_recurrent` of a layer that keeps
    a state. Outputs are `logits` (batch, seq, vocabulary) and `present_key_i`,
    `present_value_i` (batch, heads, total, head size). A past of 0 is a prompt: then only the
    token ids have to be given.

    Args:
        model: left as it was.
        folder: of the model's files, whose tokenizer and settings of generation are noted.
        seed: of the example token ids.
        check: as for `gw.trace`.

    Returns:
        a program with the record `Generation`.

    Raises:
        NoCache: the model keeps no cache of keys and values, or is another one with it.
        ModelError: it cannot be traced.
    """
    with fixed_rotary(model):
        return _traced(model, ModelFacts.of(model, folder), folder, seed, check)


def _traced(
    model: nn.Module, found: ModelFacts, folder: str | Path | None, seed: int, check: bool
) -> Program:
    with traceable(model):
        decoder = examine(model, seed)
    program = trace(
        model,
        decoder.examples,
        _free_axes(decoder),
        dims=_ranges(decoder, found),
        ranges={
            "input_ids": (0, float(decoder.vocabulary)),
            "position_ids": (0, float(found.context_length or decoder.vocabulary)),
        },
        check=check,
        derived=DERIVED if "attention_mask" in decoder.examples else None,
        call=decoder.call,
    )
    _refuse_a_fixed_length(program)
    signature = replace(program.signature, defaults=_defaults(decoder))
    record = record_of(decoder, found, folder)
    facts = {**program.facts, FACT: record.to_json()}
    if check:
        _hold_to_model(program.replace(facts=facts), model, record)
    if found.notes:
        facts["trace"] = _noted(facts.get("trace", {}), found.notes)
    return program.replace(signature=signature, facts=facts)


def _refuse_a_fixed_length(program: Program) -> None:
    """Raises NoCache where the number of tokens is no free dimension, with the trace's reason."""
    if "seq" not in program.signature.dims:
        notes = [n for n in program.facts.get("trace", {}).get("notes", ()) if "'seq'" in n]
        raise NoCache(f"its length cannot be free: {'; '.join(notes) or 'the trace fixes it'}")


def _hold_to_model(program: Program, model: nn.Module, record: Generation) -> None:
    """Prompt and steps of the program, over a ragged batch, are the model's on each text alone.

    Raises:
        NoCache: they are not.
    """
    ids = texts(record)
    with traceable(model):
        expected = by_model(model, record, ids)
    error = distance(expected, in_steps(runner_of(program, record), record, ids))
    if not error.within(max(TOLERANCE, ROUNDINGS * roundoff(program))):
        raise NoCache(
            f"with it, step by step, the model is another than at once (relative error "
            f"{error.relative:.3g})"
        )


def _noted(traced: Mapping[str, Any], notes: tuple[str, ...]) -> dict[str, Any]:
    for note in notes:
        warnings.warn(note, TraceWarning, stacklevel=4)
    return {**traced, "notes": [*traced.get("notes", ()), *notes]}


def record_of(decoder: Decoder, found: ModelFacts, folder: str | Path | None) -> Generation:
    """The record of a decoder."""
    call = decoder.call
    return Generation(
        "decoder",
        mask="attention_mask" if call.has_mask else None,
        positions="position_ids" if call.has_positions else None,
        layers=call.layers,
        states=tuple((state.past, state.present) for state in call.states),
        vocab_size=decoder.vocabulary,
        tokenizer=None if folder is None else str(folder),
        **found.as_fields(),
    )


def _ranges(decoder: Decoder, found: ModelFacts) -> dict[str, DimRange]:
    """Of a model of states alone nothing grows, and nothing has an end."""
    if not decoder.call.layers:
        return {}
    return {"past": DimRange(0), "total": DimRange(1, found.context_length)}


def _free_axes(decoder: Decoder) -> dict[str, dict[int, str]]:
    axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "total"},
            "position_ids": {0: "batch", 1: "seq"}}  # fmt: skip
    axes |= {state.past: {0: "batch"} for state in decoder.call.states}
    return {name: axes.get(name, {0: "batch", 2: "past"}) for name in decoder.examples}


def _defaults(decoder: Decoder) -> dict[str, Default]:
    rules: dict[str, Default] = {"attention_mask": "ones", "position_ids": "positions"}
    rest = [name for name in decoder.examples if name != "input_ids"]
    return {name: rules.get(name, "zeros") for name in rest}


def is_decoder(model: Any) -> bool:
    """Whether a module is a causal language model by what transformers says of it."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return (
        isinstance(model, torch.nn.Module)
        and callable(can_generate)
        and bool(can_generate())
        and getattr(model, "main_input_name", None) == "input_ids"
        and bool(getattr(config, "vocab_size", None))
        and not getattr(config, "is_encoder_decoder", False)
    )


def original_call(model: nn.Module, program: Program) -> Callable[..., Any]:
    """The model itself as a function of the program's inputs, in signature order."""
    record = Generation.of(program)
    assert record is not None
    takes = inspect.signature(model.forward).parameters
    call = DecoderCall(
        record.layers, record.mask is not None, record.positions is not None,
        tuple(State.of(past) for past, _ in record.states),
        next(name for name in CACHES if name in takes),
    )  # fmt: skip
    names = [spec.name for spec in program.signature.inputs]

    def run(*inputs: torch.Tensor) -> Any:
        return call(model, **dict(zip(names, inputs, strict=True)))

    return run
