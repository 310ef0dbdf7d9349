"""`genai_config.json`: what onnxruntime-genai reads beside a decoder's ONNX file.

Found by running onnxruntime-genai 0.18. `type` is always `decoder`, its generic kind; names of
inputs and outputs are its defaults and left out. Layers and heads are read from the graph by genai
itself; they are written because older releases ask for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphwright.ir.generation.folder import write_json, write_text_files
from graphwright.ir.generation.record import Generation
from graphwright.ir.signature import Signature

CONFIG = "genai_config.json"

LONGEST = 4096
"""Tokens that genai's buffers are made for unless a user asks for more: it allocates them whole."""

_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Defaults of the model that genai knows by the same names."""


def write_client_files(
    record: Generation, signature: Signature, folder: Path, filename: str, *, shared: bool
) -> tuple[list[Path], list[str]]:
    """Writes what clients read beside the model: tokenizer, chat template, configuration.

    Args:
        record: of the decoder.
        signature: of the artifact, with the shapes of its pasts.
        folder: that the model is in.
        filename: of the model in it.
        shared: whether every attention writes into the past it reads, as genai's shared buffers
            need.

    Returns:
        The files, and notes: what could not be written, and why.
    """
    source = None if record.tokenizer is None else Path(record.tokenizer)
    written, notes = write_text_files(source, folder, record.context_length)
    config, more = genai_config(record, signature, filename, shared=shared)
    if config is not None:
        write_json(folder / CONFIG, config)
        written.append(folder / CONFIG)
    return written, [*notes, *more]


def genai_config(
    record: Generation, signature: Signature, filename: str, *, shared: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration, and notes; None and the reason where genai runs no such model."""
    if record.kind != "decoder" or record.states or not record.layers:
        what = "a recurrent state" if record.states else f"the kind {record.kind}"
        return None, [f"no {CONFIG}: onnxruntime-genai does not run {what}"]
    shapes = {spec.name: spec.shape for spec in signature.inputs}
    _, heads, _, head_size = shapes[record.layers[0].past_key]
    notes = []
    context = record.context_length
    if context is None:
        context = LONGEST
        notes.append(f"{CONFIG} says a context length of {LONGEST}: the model bounds none")
    eos = [token for token in record.eos if token < record.vocab_size]
    pad = record.pad if record.pad is not None else (eos[0] if eos else 0)
    if not eos:
        notes.append(f"{CONFIG}: the model names no stop token, and genai stops at its pad, {pad}")
        eos = [pad]
    model = {
        "type": "decoder",
        "context_length": context,
        "vocab_size": record.vocab_size,
        "bos_token_id": record.bos if record.bos is not None else eos[0],
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": pad,
        "decoder": {
            "filename": filename, "head_size": head_size, "num_key_value_heads": heads,
            "num_hidden_layers": len(record.layers),
        },
    }  # fmt: skip
    own = record.sampling
    search = {name: own[name] for name in _SEARCH if own.get(name) is not None}
    search |= {"max_length": min(context, LONGEST), "past_present_share_buffer": shared}
    return {"model": model, "search": search}, notes
