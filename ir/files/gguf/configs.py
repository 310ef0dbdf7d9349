"""The configuration of transformers that the metadata of a GGUF file stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphwright.ir.errors import ModelError
from graphwright.ir.files.gguf.architectures import Architecture
from graphwright.ir.files.gguf.blocks import values_of
from graphwright.ir.files.gguf.reader import GgufFile


class Metadata:
    """The entries of a file under its architecture's name."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number that is not negative.

        Raises:
            ModelError: it is missing, or something else, such as a number for every layer.
        """
        found = self._entry(name, default)
        if isinstance(found, np.ndarray) and len(found) and bool((found == found[0]).all()):
            found = found[0].item()
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise self.wrong(name, "a whole number")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            ModelError: it is missing or something else.
        """
        found = self._entry(name, default)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not math.isfinite(found):
            raise self.wrong(name, "a number")
        return float(found)

    def get(self, name: str, default: Any = None) -> Any:
        """Any value under the architecture's name."""
        return self.file.entries.get(f"{self.file.architecture}.{name}", default)

    def wrong(self, name: str, wanted: str) -> ModelError:
        key = f"{self.file.architecture}.{name}"
        said = self.file.entries.get(key)
        text = "is missing" if said is None else f"is {str(said)[:40]}, not {wanted}"
        return ModelError(f"the entry {key!r} {text}", where=str(self.file.path))

    def _entry(self, name: str, default: Any) -> Any:
        found = self.get(name, default)
        if found is None:
            raise self.wrong(name, "")
        return found


def config_of(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """config.json for a file.

    Raises:
        ModelError: an entry is missing or has no meaning here.
    """
    entry = Metadata(file)
    if entry.get("expert_count", 0) and not architecture.experts:
        raise ModelError(
            f"GGUF files of {file.architecture!r} with experts are not read",
            where=str(file.path),
            fix="Pass the model's folder for transformers.",
        )
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError("there is no matrix token_embd.weight", where=str(file.path))
    width, heads = entry.whole("embedding_length"), entry.whole("attention.head_count")
    if not heads or not width:
        raise entry.wrong("attention.head_count", "1 or more")
    epsilon = "layer_norm_rms" if "rms" in architecture.epsilon else "layer_norm"
    stored = f"attention.{epsilon}_epsilon"
    if entry.get(stored) is None and architecture.epsilon == "norm_eps":
        stored = "attention.layer_norm_rms_epsilon"
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "num_hidden_layers": entry.whole("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": entry.whole("context_length"),
        architecture.epsilon: entry.number(stored),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **tokens_of(file),
    }
    if architecture.model_type == "gpt2":
        return config | {"n_inner": entry.whole("feed_forward_length", 4 * width),
                         "n_positions": config["max_position_embeddings"]}  # fmt: skip
    config |= {
        "intermediate_size": entry.whole("feed_forward_length"),
        "num_key_value_heads": entry.whole("attention.head_count_kv", heads),
        "head_dim": entry.whole("attention.key_length", width // heads),
        "rope_theta": entry.number("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    rotary = entry.whole("rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        config["partial_rotary_factor"] = rotary / config["head_dim"]
    scaling = _scaling(entry)
    if scaling is not None:
        config["rope_scaling"] = scaling
    config |= architecture.fixed
    own = _OWN.get(architecture.model_type)
    return config if own is None else config | own(entry, config)


def tokens_of(file: GgufFile) -> dict[str, Any]:
    """The numbers of special tokens; all that end an answer under `eos_token_id`."""
    entries = file.entries
    found: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        value = entries.get(f"tokenizer.ggml.{key}_token_id")
        found[f"{name}_token_id"] = value if isinstance(value, int) else None
    ends = [entries.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    found["eos_token_id"] = stops[0] if len(stops) == 1 else (stops or None)
    return found


def _scaling(entry: Metadata) -> dict[str, Any] | None:
    """The scaling of rotary positions."""
    long, short = (entry.file.tensors.get(f"rope_factors_{which}.weight")
                   for which in ("long", "short"))  # fmt: skip
    original = entry.get("rope.scaling.original_context_length")
    if long is not None and short is not None:
        factors = [values_of(stored) for stored in (long, short)]
        if factors[0] is None or factors[1] is None or original is None:
            raise entry.wrong("rope.scaling.original_context_length", "a whole number")
        found = {"rope_type": "longrope", "long_factor": factors[0].tolist(),
                 "short_factor": factors[1].tolist(),
                 "original_max_position_embeddings":
                     entry.whole("rope.scaling.original_context_length")}  # fmt: skip
        if entry.get("rope.scaling.attn_factor") is not None:
            found["attention_factor"] = entry.number("rope.scaling.attn_factor")
        return found
    kind = entry.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise entry.wrong("rope.scaling.type", "linear or yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": entry.number("rope.scaling.factor")}
    if kind == "yarn" and original is not None:
        scaling["original_max_position_embeddings"] = entry.whole(
            "rope.scaling.original_context_length"
        )
    return scaling


def _gemma2(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Softcaps, and the scale of attention, which llama.cpp knows by the number of layers."""
    wide = config["hidden_size"] // config["num_attention_heads"]
    return {
        "attn_logit_softcapping": entry.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": entry.number("final_logit_softcapping", 30.0),
        "sliding_window": entry.whole("attention.sliding_window", 4096),
        "query_pre_attn_scalar": wide if config["num_hidden_layers"] == 46 else config["head_dim"],
    }


def _gemma3(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Windows on five layers of six, whose rotary positions have a base of their own, unscaled."""
    wide = config["hidden_size"] // config["num_attention_heads"]
    softcap = entry.get("final_logit_softcapping")
    return {
        "sliding_window": entry.whole("attention.sliding_window"),
        "rope_local_base_freq": entry.number("rope.local.freq_base", 10000.0),
        "query_pre_attn_scalar": wide if config["num_hidden_layers"] == 62 else config["head_dim"],
        "final_logit_softcapping": softcap,
    }


def _phi3(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """A window is stored where the model has one; 0 is none."""
    original = entry.get("rope.scaling.original_context_length")
    found = {"sliding_window": entry.whole("attention.sliding_window", 0) or None,
             "pad_token_id": config["pad_token_id"]}  # fmt: skip
    return found if original is None else {**found, "original_max_position_embeddings": original}


def _stablelm(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """What its layers have is seen by their tensors."""
    tensors = entry.file.tensors
    return {"use_qkv_bias": "blk.0.attn_q.bias" in tensors,
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors}  # fmt: skip


def _starcoder2(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_bias": config["attention_bias"],
            "sliding_window": entry.whole("attention.sliding_window", 0) or None}  # fmt: skip


def _mixtral(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"num_local_experts": entry.whole("expert_count"),
            "num_experts_per_tok": entry.whole("expert_used_count")}  # fmt: skip


def _qwen_moe(entry: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp scales the chosen experts' weights to a sum of 1 for qwen3 alone, by its name."""
    found = {
        "num_experts": entry.whole("expert_count"),
        "num_experts_per_tok": entry.whole("expert_used_count"),
        "moe_intermediate_size": entry.whole("expert_feed_forward_length"),
        "norm_topk_prob": config["model_type"] == "qwen3_moe",
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    if config["model_type"] == "qwen2_moe":
        shared = "expert_shared_feed_forward_length"
        found |= {"shared_expert_intermediate_size": entry.whole(shared),
                  "qkv_bias": config["attention_bias"]}  # fmt: skip
    return found


_OWN = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
"""Entries of one architecture alone, by transformers' name."""
