"""Small GGUF files of transformers' models, written by llama.cpp's own package.

The names are the package's, the changes of tensors those of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
                               "num_hidden_layers": 6}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi2": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "olmo2": ("olmo2", {}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"sliding_window": None, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_inner": 128}),
    "llama with experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2,
                                       "head_dim": 16}),
    "qwen2moe": ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "qkv_bias": True,
                               "moe_intermediate_size": 32,
                               "shared_expert_intermediate_size": 96}),
    "qwen3moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
                               "moe_intermediate_size": 32, "norm_topk_prob": True}),
}  # fmt: skip
"""By a name: transformers' kind of model, and entries of its configuration."""


def tiny(name: str) -> Any:
    """A random model."""
    import transformers

    kind, entries = KINDS[name]
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **entries})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                value.add_(torch.randn(value.shape) * 0.1)
    return model


def write(
    model: Any, name: str, path: Path, encode: Any = None, more: Mapping[str, Any] | None = None,
    split: int = 0,
) -> Path:  # fmt: skip
    """Writes a model as `name` (a key of KINDS) says.

    Args:
        model: of transformers.
        name: its kind.
        path: of the file.
        encode: type of a matrix by its tensor's name; F32 when left out.
        more: further entries, by their name below the architecture.
        split: tensors in one file at most; 0 for one file, at `path` itself.
    """
    import gguf

    kind = name.split()[0]
    config = model.config
    writer = gguf.GGUFWriter(str(path), kind, split_max_tensors=split)
    entries = {**_entries(config, kind), **(more or {})}
    for key, value in entries.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"{kind}.{key}", value
        )
    for key in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", getattr(config, f"{key}_token_id"))
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in _tensors(model, kind):
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert found is not None, key
        _add(writer, found, tensor.detach().float(), encode)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, tensor: Tensor, encode: Any) -> None:
    import gguf

    kind = encode(name) if encode is not None and tensor.dim() > 1 else "F32"
    quantization = gguf.GGMLQuantizationType[kind]
    values = np.ascontiguousarray(tensor.numpy())
    if kind == "F32":
        writer.add_tensor(name, values)
    else:
        data = gguf.quants.quantize(values, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)


def _entries(config: Any, kind: str) -> dict[str, Any]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    found = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.n_inner,
        "attention.head_count": config.num_attention_heads, "attention.key_length": head,
        "attention.head_count_kv":
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    for theirs in (
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ):
        if getattr(config, theirs, None) is not None:
            entry = "layer_norm_rms_epsilon" if "rms" in theirs else "layer_norm_epsilon"
            found[f"attention.{entry}"] = float(getattr(config, theirs))
    for theirs, ours in (
        ("num_experts", "count"), ("num_local_experts", "count"),
        ("num_experts_per_tok", "used_count"), ("moe_intermediate_size", "feed_forward_length"),
        ("shared_expert_intermediate_size", "shared_feed_forward_length"),
    ):  # fmt: skip
        if getattr(config, theirs, None) is not None:
            found[f"expert_{ours}"] = getattr(config, theirs)
    if kind.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    if kind == "gemma2":
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return found


def _tensors(model: Any, kind: str) -> list[tuple[str, Tensor]]:
    """The tensors as llama.cpp's converter stores them."""
    config, found = model.config, []
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and (".q_proj." in key or ".k_proj." in key):
            heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        if kind in ("gemma2", "gemma3", "nemotron") and key.endswith("norm.weight"):
            tensor = tensor + 1
        if kind == "gpt2" and tensor.dim() == 2 and ".h." in key:
            tensor = tensor.t()
        if key.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        if key.endswith("experts.gate_up_proj"):  # transformers' own stack of both
            stem = key.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, 1)
            found += [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
            continue
        found.append((f"{key}.weight" if key.endswith("experts.down_proj") else key, tensor))
    return found
