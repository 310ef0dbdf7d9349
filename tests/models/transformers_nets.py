"""Small transformers of the library's own classes, with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import graphwright as gw

WIDTH, HEADS, INNER, LAYERS, WORDS = 32, 2, 64, 2, 48


def llama(**changes: Any) -> Any:
    """A decoder of SmolLM2's shape: rotary positions, grouped heads, RMS norms, a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS,
    } | changes  # fmt: skip
    config = LlamaConfig(tie_word_embeddings=True, use_cache=False, **sizes)
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    """A decoder with one product for queries, keys and values, and learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_positions=32,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    """An encoder, the architecture of the sentence encoder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=INNER,
        num_hidden_layers=LAYERS,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@cache
def program(kind: str) -> gw.Program:
    """A traced net, with free batch and length; its inputs are token ids and a mask."""
    torch.manual_seed(0)
    net = {"llama": llama, "gpt2": gpt2, "bert": bert}[kind]()
    ids = torch.randint(0, WORDS, (2, 8))
    names = ("input_ids", "attention_mask")
    inputs = dict(zip(names, (ids, torch.ones_like(ids)), strict=True))
    return gw.trace(net, inputs, dynamic={name: {0: "batch", 1: "length"} for name in names})
