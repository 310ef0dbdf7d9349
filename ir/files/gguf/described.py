"""The metadata of a GGUF file for a model that comes from a folder of transformers.

llama.cpp knows how a vocabulary cuts text by a name, `tokenizer.ggml.pre`. A name is given here
to the few forms of tokenizer.json that stand for one; others are refused, for a wrong name gives a
model that reads other tokens and says nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from graphwright.ir.errors import ModelError

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architectures by transformers' kinds of models that are described."""

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5

_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}  # fmt: skip
"""llama.cpp's names of regular expressions that cut text."""


def entries_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a file for a model.

    Args:
        folder: of transformers, with the tokenizer.
        config: its config.json.

    Raises:
        ModelError: an architecture, a rotary embedding or a tokenizer that has no description here.
    """
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise ModelError(
            f"export gguf: models of the kind {config.get('model_type')!r} are written from a GGUF "
            f"file only, whose metadata is copied; from a folder, those of {', '.join(KINDS)}",
            where=str(folder),
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if rope != "default":
        raise ModelError(f"export gguf: rotary positions of the type {rope!r} are not written",
                         where=str(folder))  # fmt: skip
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    entries: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head, "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head,
        "rope.freq_base": float(config.get("rope_theta") or scaling.get("rope_theta") or 10000.0),
        "vocab_size": config["vocab_size"],
    }  # fmt: skip
    named = {f"{kind}.{key}": value for key, value in entries.items()}
    return {"general.architecture": kind, "general.type": "model", "general.name": folder.name,
            **named, **_tokenizer(folder, config)}  # fmt: skip


def _tokenizer(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError("export gguf: the folder has no tokenizer.json", where=str(folder))
    found = json.loads(path.read_text(encoding="utf-8"))
    pre = _pre_tokenizer(found)
    if found.get("model", {}).get("type") != "BPE" or pre is None:
        raise ModelError(
            "export gguf: llama.cpp's name for this tokenizer is not known here (known: gpt-2, "
            f"smollm, {', '.join(_SPLITS.values())})",
            where=str(path),
            fix="Begin with a GGUF file of the model, whose metadata is copied.",
        )
    tokens, types = _tokens(found, int(config["vocab_size"]))
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]
    ]
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _begins(path, config),
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = config.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            entries[f"tokenizer.ggml.{key}_token_id"] = value
    template = _template(folder)
    return entries if template is None else {**entries, "tokenizer.chat_template": template}


def _pre_tokenizer(found: dict[str, Any]) -> str | None:
    """llama.cpp's name of a pre-tokenizer; None for one that is not known."""
    pre = found.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    by_regex = last.get("use_regex", True)
    if len(steps) == 1:
        return "gpt-2" if by_regex else None
    first = steps[0]
    if len(steps) == 2 and first.get("type") == "Digits":
        return "smollm" if by_regex and first.get("individual_digits") else None
    if len(steps) == 2 and first.get("type") == "Split" and first.get("behavior") == "Isolated":
        return None if by_regex else _SPLITS.get(first.get("pattern", {}).get("Regex", ""))
    return None


def _tokens(found: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens by number, and what each of them is."""
    vocabulary = {number: token for token, number in found["model"]["vocab"].items()}
    kinds = dict.fromkeys(vocabulary, _NORMAL)
    for added in found.get("added_tokens", []):
        vocabulary[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added.get("special") else _USER
    tokens = [vocabulary.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [kinds.get(number, _UNUSED) for number in range(size)]


def _begins(path: Path, config: dict[str, Any]) -> bool:
    """Whether the tokenizer puts the beginning of a text in front."""
    from tokenizers import Tokenizer

    numbers = Tokenizer.from_file(str(path)).encode("a").ids
    return bool(numbers) and numbers[0] == config.get("bos_token_id")


def _template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    template = found.get("chat_template")
    return template if isinstance(template, str) else None
