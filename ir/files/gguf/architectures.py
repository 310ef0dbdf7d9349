"""The architectures of GGUF files that transformers has a model of: names of tensors, and changes.

llama.cpp names tensors `blk.3.attn_q.weight`, and stores some of them changed: rows of queries and
keys in the order of another rotary embedding, norms with 1 added. Rows are put back in blocks of
codes as they are, for a block never spans two rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.gguf.blocks import values_of
from graphwright.ir.files.gguf.reader import GgufFile, Stored

_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = {**_ATTENTION, **_GATED, "ffn_norm": "post_attention_layernorm"}
_NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    **_ATTENTION, **_GATED, "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IGNORED = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors that are no weights: they describe the rotary embedding."""


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes:
        model_type: of transformers.
        names: of modules in a layer, by llama.cpp's.
        epsilon: name of the norms' epsilon in the configuration.
        outer: names of the other modules, by llama.cpp's.
        layers: name of the list of layers.
        rotated: query and key rows lie in pairs that are rotated together.
        centred: weights of norms are stored with 1 added.
        turned: modules of a layer whose weight transformers stores as (in, out).
        experts: names of one expert's modules, `{}` for its number, by llama.cpp's name of the
            tensor that holds those of all experts, (experts, out, in).
        fixed: further entries of the configuration.
    """

    model_type: str
    names: Mapping[str, str]
    epsilon: str = "rms_norm_eps"
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    layers: str = "model.layers"
    rotated: bool = False
    centred: bool = False
    turned: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)


_GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip

_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}

MIXTRAL = Architecture(
    "mixtral", {**_ATTENTION, "ffn_norm": "post_attention_layernorm",
                "ffn_gate_inp": "block_sparse_moe.gate"},
    rotated=True,
    experts={f"ffn_{part}_exps": f"block_sparse_moe.experts.{{}}.{theirs}"
             for part, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))},
)  # fmt: skip
"""What llama.cpp calls llama too, and has experts."""

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _DENSE, rotated=True),
    "qwen2": Architecture("qwen2", _DENSE),
    "qwen3": Architecture("qwen3", {**_DENSE, **_NORMED}),
    "qwen2moe": Architecture(
        "qwen2_moe", {**_DENSE, "ffn_gate_inp": "mlp.gate", **_SHARED}, experts=_EXPERTS
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", {**_DENSE, **_NORMED, "ffn_gate_inp": "mlp.gate"}, experts=_EXPERTS
    ),
    "gemma2": Architecture("gemma2", _SANDWICH, centred=True),
    "gemma3": Architecture("gemma3_text", {**_SANDWICH, **_NORMED}, centred=True),
    "phi3": Architecture(
        "phi3",
        {"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj",
         "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
    ),
    "phi2": Architecture(
        "phi",
        {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        epsilon="layer_norm_eps",
        outer={**_OUTER, "output_norm": "model.final_layernorm"},
    ),
    "stablelm": Architecture("stablelm", _DENSE, epsilon="layer_norm_eps"),
    "olmo2": Architecture(
        "olmo2",
        {**{k: v for k, v in _SANDWICH.items() if k not in ("attn_norm", "ffn_norm")}, **_NORMED},
    ),
    "nemotron": Architecture(
        "nemotron", {k: v for k, v in _DENSE.items() if k != "ffn_gate"}, epsilon="norm_eps",
        centred=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.c_fc",
         "ffn_down": "mlp.c_proj"},
        epsilon="norm_epsilon",
    ),
    "gpt2": Architecture(
        "gpt2", _GPT2, epsilon="layer_norm_epsilon",
        outer={"token_embd": "transformer.wte", "position_embd": "transformer.wpe",
               "output_norm": "transformer.ln_f", "output": "lm_head"},
        layers="transformer.h", turned=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}  # fmt: skip
"""By llama.cpp's name."""

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTSIDE = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Placed:
    """The tensors of a file by transformers' names.

    Attributes:
        floats: tensors that are numbers.
        codes: matrices in blocks, by the name of their layer.
    """

    floats: dict[str, Tensor]
    codes: dict[str, Stored]


def architecture_of(file: GgufFile) -> Architecture:
    """The architecture of a file.

    Raises:
        ModelError: it is none of those above.
    """
    found = ARCHITECTURES.get(file.architecture)
    if file.architecture == "llama" and file.entries.get("llama.expert_count", 0):
        return MIXTRAL
    if found is None:
        raise ModelError(
            f"GGUF files of the architecture {file.architecture!r} are not read",
            where=str(file.path),
            fix=f"Those of {', '.join(sorted(ARCHITECTURES))} are; or pass the model's folder for "
            "transformers.",
        )
    return found


def placed(file: GgufFile, heads: tuple[int, int]) -> Placed:
    """The tensors under transformers' names, with llama.cpp's changes undone.

    Args:
        file: of a known architecture.
        heads: numbers of query and of key heads.

    Raises:
        ModelError: a tensor has no place in the architecture, or a form that it cannot have.
    """
    architecture = architecture_of(file)
    result = Placed({}, {})
    for name, stored in file.tensors.items():
        if name.partition(".")[0] in _IGNORED:
            continue
        leaf, owner, part = _place(architecture, name, file)
        if leaf in architecture.experts and part == "weight":
            _place_experts(result, owner, name, stored, file)
            continue
        if architecture.rotated and leaf in ("attn_q", "attn_k"):
            stored = _unrotated(stored, heads[leaf == "attn_k"], name, file)
        values = values_of(stored)
        if values is None:
            if part != "weight" or len(stored.shape) != 2:
                raise ModelError(
                    f"{name!r} is no matrix, and is stored in {stored.type.name}",
                    where=str(file.path),
                )
            result.codes[owner] = stored
            continue
        if architecture.centred and leaf.endswith("norm") and part == "weight":
            values = values.float() - 1
        if leaf in architecture.turned and part == "weight":
            values = values.t()
        if leaf == "ffn_gate_inp_shexp" and values.dim() == 1:
            values = values.unsqueeze(0)  # a layer of one output, which llama.cpp stores as a row
        result.floats[f"{owner}.{part}"] = values
    return result


def _place_experts(result: Placed, owner: str, name: str, stored: Stored, file: GgufFile) -> None:
    """Puts the matrix of each expert in the place of a stack of them, (experts, out, in)."""
    if len(stored.shape) != 3:
        raise ModelError(
            f"{name!r} has the sizes {stored.shape}, and should have one for the experts too",
            where=str(file.path),
        )
    for number, rows in enumerate(stored.data.split(stored.shape[1])):
        one = Stored(stored.type, stored.shape[1:], rows)
        values = values_of(one)
        if values is None:
            result.codes[owner.format(number)] = one
        else:
            result.floats[f"{owner.format(number)}.weight"] = values


def _place(architecture: Architecture, name: str, file: GgufFile) -> tuple[str, str, str]:
    """llama.cpp's name of a tensor's module, transformers', and which of its tensors it is."""
    inside = _LAYER.fullmatch(name)
    names = {**architecture.names, **architecture.experts}
    if inside is not None and inside[2] in names:
        owner = f"{architecture.layers}.{int(inside[1])}.{names[inside[2]]}"
        return inside[2], owner, inside[3]
    outside = _OUTSIDE.fullmatch(name)
    if outside is not None and outside[1] in architecture.outer:
        return outside[1], architecture.outer[outside[1]], outside[2]
    raise ModelError(
        f"the tensor {name!r} has no place in a model of the architecture {file.architecture!r}",
        where=str(file.path),
        fix="It may be of a variant that is not read; pass the model's folder for transformers.",
    )


def _unrotated(stored: Stored, heads: int, name: str, file: GgufFile) -> Stored:
    """Rows in transformers' order: of every head the first ones of all pairs, then the second."""
    is_vector = len(stored.shape) == 1
    rows = stored.data.reshape(-1, stored.type.size) if is_vector else stored.data
    if len(rows) % (2 * heads):
        raise ModelError(
            f"{name!r} has {len(rows)} rows, which are not {heads} heads", where=str(file.path)
        )
    paired = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return Stored(stored.type, stored.shape, paired.view(stored.data.shape))


def rotary_factors(file: GgufFile) -> Tensor | None:
    """(half of the rotary size,) what the rotary frequencies are divided by; None for nothing.

    Raises:
        ModelError: they are no floats.
    """
    stored = file.tensors.get("rope_freqs.weight")
    if stored is None:
        return None
    values = values_of(stored)
    if values is None or values.dim() != 1 or not bool((values.float() > 0).all()):
        raise ModelError("rope_freqs.weight holds no factors", where=str(file.path))
    return values.to(torch.float32)
