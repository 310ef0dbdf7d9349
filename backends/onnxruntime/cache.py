"""Decoders with a cache as ONNX models: names that clients look for, sizes, and our record.

The runtime is given buffers that are longer than the past in them where attention appends to the
cache in place. So the length of the past is never read from a past: it is what the mask has more
than the tokens.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from graphwright.backends.onnxruntime.emitter import Emitter
from graphwright.backends.onnxruntime.steps.cached_attention import CACHE_FACT, KEPT_FACT
from graphwright.ir.generation.record import FACT, Generation
from graphwright.ir.graph.sizes import sizes_of
from graphwright.ir.ops.quantize_cache import quantize_cache
from graphwright.ir.program import Program


def onnx_names(program: Program) -> dict[str, str]:
    """Names of a decoder's inputs and outputs in the model, where they are not the program's."""
    record = Generation.of(program)
    return {} if record is None else record.onnx_names()


def place_cache_sizes(e: Emitter, program: Program) -> None:
    """Lets the length of the past be computed from mask and tokens, which are never longer."""
    record = Generation.of_decoder(program)
    if record is None or record.mask is None or not record.layers:
        return
    nodes = {str(node.target): node for node in program.graph.find_nodes(op="placeholder")}
    ids, mask = nodes[record.ids], nodes[record.mask]
    length, total = sizes_of(ids)[1], sizes_of(mask)[1]
    if isinstance(length, int) or isinstance(total, int):
        return
    e.begin(mask)
    parts = [e.op("Shape", e.values[n], start=1, end=2) for n in (mask, ids)]
    e.let(total, parts[0])
    e.let(length, parts[1])
    before = e.op("Sub", *parts)
    for layer in record.layers:
        for name in (layer.past_key, layer.past_value):
            past = sizes_of(nodes[name])[2]
            if not isinstance(past, int):
                e.let(past, before)
                e.let(past + length, parts[0])


def drop_positions(model: ir.Model, program: Program) -> None:
    """Takes the input of positions out of a model that has them in its attention."""
    record = Generation.of_decoder(program)
    if record is None or CACHE_FACT not in program.facts:
        return
    for value in list(model.graph.inputs):
        if value.name == record.positions and not value.uses():
            model.graph.inputs.remove(value)


def cache_record(program: Program) -> dict[str, Any]:
    """What an artifact keeps of how it generates."""
    if FACT not in program.facts:
        return {}
    # Where the tokenizer lay is no part of the model.
    generation = {**program.facts[FACT], "tokenizer": None}
    return {"generation": generation, "cache": program.facts.get(CACHE_FACT)}


def cache_notes(program: Program, logits: str) -> dict[str, Any]:
    """How a decoder keeps its cache, for the notes: shared buffers, or why its parts are joined.

    Args:
        program: behind all steps.
        logits: which ones it gives, `last` or `all`.
    """
    fused = program.facts.get(CACHE_FACT)
    left = dict(program.facts.get(KEPT_FACT, {}))
    form = {"form": "joined"} if fused is None else {"form": "shared", **fused}
    rounded = len(program.graph.find_nodes(op="call_function", target=quantize_cache))
    form |= {"rounded": rounded} if rounded else {}
    return {**form, "logits": logits, **({"left": left} if left else {})}
