"""A random decoder in a transformers folder, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTEXT = 128
STOP = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def write(folder: Path, **config: Any) -> Any:
    """Writes the folder; returns the model. `config` goes into LlamaConfig."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([STOP, *ROLES])
    stop = tokenizer.token_to_id(STOP)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": tokenizer.get_vocab_size(),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "max_position_embeddings": CONTEXT,
                "initializer_range": 0.5,
                "tie_word_embeddings": True,
                "bos_token_id": stop,
                "eos_token_id": stop,
                "pad_token_id": stop,
                **config,
            }
        )
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    own = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": STOP, "pad_token": STOP}
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    return model
