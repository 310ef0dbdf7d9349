"""A tiny decoder with a tokenizer of words, a text, and questions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig

WORDS = 61
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="package")
def model() -> Any:
    """Random weights, large enough that no two logits are close."""
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    )
    for name, parameter in found.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


@pytest.fixture(scope="package")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder of transformers, with `text.txt` and `questions.jsonl` in it."""
    place: Path = tmp_path_factory.mktemp("decoder")
    model.save_pretrained(place)
    words = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(place / "tokenizer.json"))
    draw = random.Random(0)
    text = [
        [f"w{draw.randrange(1, WORDS)}" for _ in range(draw.randrange(4, 12))] for _ in range(9)
    ]
    (place / "text.txt").write_text("\n".join(" ".join(line) for line in text) + "\n")
    questions = [
        {
            "question": " ".join(line),
            "choices": [" ".join(line[: 1 + n]) for n in (0, 2, 1)],
            "answer": at % 3,
        }
        for at, line in enumerate(text)
    ]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    return place


@pytest.fixture(scope="package")
def program(model: Any) -> Any:
    """The model without a cache, its batch and length free."""
    import graphwright as gw

    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    return gw.trace(
        Logits(model), {"input_ids": ids, "attention_mask": mask},
        dynamic={name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask")},
        ranges={"input_ids": (0, WORDS), "attention_mask": (1, 2)},
    )  # fmt: skip


class Logits(torch.nn.Module):
    """A decoder of transformers without its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Logits (batch, length, words)."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return {"logits": found.logits}
