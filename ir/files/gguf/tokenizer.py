"""The files of the tokenizer that a GGUF file carries, as transformers and others read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphwright.ir.causes import innermost
from graphwright.ir.files.gguf.reader import GgufFile

_PARTS = {
    "model": "tokenizer_type", "pre": "pre_tokenizer_type", "tokens": "tokens", "scores": "scores",
    "token_type": "token_type", "merges": "merges", "precompiled_charsmap": "precompiled_charsmap",
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
}  # fmt: skip
"""Entries below `tokenizer.ggml.`, by transformers' names."""

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(file: GgufFile, folder: Path, context: int) -> list[str]:
    """Writes tokenizer.json, tokenizer_config.json and the chat template; returns what to say.

    Args:
        file: with the vocabulary among its entries.
        folder: that exists.
        context: tokens that the model takes.
    """
    if not isinstance(file.entries.get("tokenizer.ggml.tokens"), list):
        return ["the file has no tokenizer: the model takes numbers of tokens, not text"]
    try:
        tokenizer = _tokenizer(file, context)
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the libraries raise anything
        return [f"the file's tokenizer is not read, so that the model takes numbers of tokens, not "
                f"text: {innermost(error)}"]  # fmt: skip
    # A number that no tokenizer of this model should see: transformers writes 1e30.
    settings = folder / "tokenizer_config.json"
    found = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**found, "model_max_length": context}, indent=2) + "\n",
                        encoding="utf-8")  # fmt: skip
    return []


def _tokenizer(file: GgufFile, context: int) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    entries = {ours: file.entries.get(f"tokenizer.ggml.{name}") for name, ours in _PARTS.items()}
    parts = {name: _plain(value) for name, value in entries.items() if value is not None}
    backend, _ = convert_gguf_tokenizer(file.architecture, parts)
    tokens = parts["tokens"]
    given: dict[str, Any] = {"model_max_length": context}
    for name, key in _SPECIAL.items():
        number = file.entries.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < len(tokens):
            given[name] = tokens[number]
    is_pieces = parts.get("tokenizer_type") == "llama"
    for name in ("add_bos_token", "add_eos_token"):
        # Older files of pieces have no entry, and llama.cpp begins their text with BOS.
        default = is_pieces and name == "add_bos_token"
        given[name] = bool(file.entries.get(f"tokenizer.ggml.{name}", default))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **given)
    template = file.entries.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
