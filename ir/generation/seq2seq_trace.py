"""From an encoder-decoder of transformers to two programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graphwright.ir.edit import Editor
from graphwright.ir.generation.model_facts import ModelFacts
from graphwright.ir.generation.record import FACT, Generation
from graphwright.ir.generation.seq2seq import (
    SOURCE_MASK,
    CrossDecoderCall,
    EncoderCall,
    Seq2Seq,
    examine,
)
from graphwright.ir.parts import Parts
from graphwright.ir.program import Program
from graphwright.ir.signature import Default, DimRange
from graphwright.ir.trace.capture import trace
from graphwright.ir.trace.prepare import traceable

ENCODER, DECODER = "encoder", "decoder"


def trace_encoder_decoder(
    model: Any, *, folder: str | Path | None = None, seed: int = 0, check: bool = True
) -> Parts:
    """Traces an encoder-decoder of transformers as the parts `encoder` and `decoder`.

    The encoder takes `input_ids` (batch, source) and `attention_mask` (batch, source), or features
    of a fixed size, and gives `encoder_hidden_states` and, per layer i of the decoder,
    `cross_key_i`, `cross_value_i` (batch, heads, source, head size). The decoder takes `input_ids`
    (batch, seq), `encoder_attention_mask` (batch, source) where the encoder has a mask,
    `past_key_i`, `past_value_i` (batch, heads, past, head size) and what the encoder gave; it gives
    `logits` (batch, seq, vocabulary), `present_key_i`, `present_value_i`. A past of 0 is the start.
    The decoder takes no mask of its own: rows of a batch begin together.

    Args:
        model: left as it was.
        folder: of the model's files, whose tokenizer and facts of generation are noted.
        seed: of the example inputs.
        check: as for `gw.trace`.

    Raises:
        NoCache: the decoder keeps no cache of keys and values.
        ModelError: it cannot be traced.
    """
    with traceable(model):
        found = examine(model, seed)
    facts = ModelFacts.of(model, folder)
    parts = {ENCODER: _encoder(model, found, check), DECODER: _decoder(model, found, check)}
    shared = {**facts.as_fields(), "vocab_size": found.vocabulary,
              "context_length": _context_length(model),
              "tokenizer": None if folder is None else str(folder)}  # fmt: skip
    start = _decoder_start(model)
    mask = SOURCE_MASK if found.decoder.has_mask else None
    records = {
        ENCODER: Generation(
            "encoder", ids=found.encoder.main,
            mask="attention_mask" if found.encoder.has_mask else None,
            cross=found.encoder.cross, decoder_start=start, **shared,
        ),
        DECODER: Generation(
            "cross_decoder", mask=None, layers=found.decoder.layers, cross=found.decoder.cross,
            cross_mask=mask, decoder_start=start, **shared,
        ),
    }  # fmt: skip
    return Parts({name: _noted(program, records[name]) for name, program in parts.items()})


def is_encoder_decoder(model: Any) -> bool:
    """Whether a module is an encoder-decoder that generates, by what transformers says of it."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return bool(
        getattr(config, "is_encoder_decoder", False) and callable(can_generate) and can_generate()
    )


def original_half(model: Any, program: Program) -> Callable[..., Any]:
    """The model's own half as a function of the program's inputs, in signature order."""
    record = Generation.of(program)
    assert record is not None
    call: EncoderCall | CrossDecoderCall
    if record.kind == "encoder":
        call = EncoderCall(record.ids, record.mask is not None, record.cross)
    else:
        width = getattr(model.config, "d_model", None) or model.config.hidden_size
        call = CrossDecoderCall(record.layers, record.cross, width, record.cross_mask is not None)
    names = [spec.name for spec in program.signature.inputs]

    def run(*inputs: Tensor) -> Any:
        return call(model, **dict(zip(names, inputs, strict=True)))

    return run


def _encoder(model: Any, found: Seq2Seq, check: bool) -> Program:
    main = found.encoder.main
    is_text = found.encoder.has_mask
    axes = {0: "batch", 1: "source"} if is_text else {0: "batch"}
    rows = model.get_encoder().get_input_embeddings().num_embeddings if is_text else None
    program = trace(
        model,
        found.source,
        dict.fromkeys(found.source, axes),
        ranges={main: (0, float(rows)), "attention_mask": (1, 2)} if rows else {},
        check=check,
        call=found.encoder,
    )
    program = _only_what_is_read(program)
    rules: Mapping[str, Default] = {"attention_mask": "ones"} if is_text else {}
    return program.replace(signature=replace(program.signature, defaults=dict(rules)))


def _decoder(model: Any, found: Seq2Seq, check: bool) -> Program:
    call = found.decoder
    past = [name for layer in call.layers for name in (layer.past_key, layer.past_value)]
    source = {0: "batch", 2: "source"} if call.has_mask else {0: "batch"}
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "seq"}}
    axes |= {name: {0: "batch", 2: "past"} for name in past}
    axes |= {name: dict(source) for pair in call.cross for name in pair}
    if call.has_mask:
        axes[SOURCE_MASK] = {0: "batch", 1: "source"}
    program = trace(
        model,
        found.examples,
        axes,
        dims={"past": DimRange(0)},
        ranges={"input_ids": (0, float(found.vocabulary)), SOURCE_MASK: (1, 2)},
        check=check,
        call=call,
    )
    rules: dict[str, Default] = dict.fromkeys(past, "zeros")
    if call.has_mask:
        rules[SOURCE_MASK] = "ones"
    return program.replace(signature=replace(program.signature, defaults=rules))


def _only_what_is_read(program: Program) -> Program:
    """Without the rest of the decoder's call, which torch keeps: it takes every attention for a
    random one, though none drops anything here."""
    editor = Editor(program, by="trace")
    is_kept = ("placeholder", "output")
    editor.changed = editor.graph.eliminate_dead_code(lambda node: node.op in is_kept)
    return editor.finish()


def _noted(program: Program, record: Generation) -> Program:
    return program.replace(facts={**program.facts, FACT: record.to_json()})


def _context_length(model: Any) -> int | None:
    """Most tokens of the decoder: its table of positions; relative ones have no end."""
    for key in ("max_target_positions", "max_position_embeddings"):
        found = getattr(model.config, key, None)
        if isinstance(found, int):
            return found
    return None


def _decoder_start(model: Any) -> int | None:
    """The token that a decoder begins with."""
    for source in (getattr(model, "generation_config", None), model.config):
        for key in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(source, key, None)
            if isinstance(found, int):
                return found
    return None
