"""The pretrained SmolLM2 compiled in float32, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import smollm2

import graphwright as gw

transformers = pytest.importorskip("transformers")

NEW = 48
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "What is the largest planet?"]


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return smollm2.program()


def theirs(net: Any, ids: Sequence[int]) -> list[int]:
    prompt = torch.tensor([list(ids)])
    mask = torch.ones_like(prompt)
    out = net.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return [int(token) for token in out[0, len(ids) :]]


def is_tie(net: Any, ids: Sequence[int]) -> bool:
    """Whether the order of sums decides the token behind `ids`."""
    with torch.inference_mode():
        first, second = net(torch.tensor([list(ids)])).logits[0, -1].topk(2).values.tolist()
    return bool(first - second <= 1e-3)


@pytest.mark.slow
def test_float32_generates_transformers_tokens_in_a_ragged_batch(program: gw.Program) -> None:
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.notes["cache"]["form"] == "shared"
    tokenizer = compiled.language_model.tokenizer
    assert tokenizer is not None
    asked = tokenizer.encode_chat([{"role": "user", "content": PROMPTS[2]}])
    prompts = [*map(tokenizer.encode, PROMPTS[:2]), asked]
    net = transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder())
    done = compiled.generate(prompts, max_new_tokens=NEW, do_sample=False)
    assert isinstance(done, list)
    for prompt, answer in zip(prompts, done, strict=True):
        expected = theirs(net, prompt)
        pairs = enumerate(zip(expected, answer.ids, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), None)
        assert at is None or is_tie(net, [*prompt, *expected[:at]])
        assert at is not None or len(expected) == len(answer.ids)
    assert "Jupiter" in str(done[2])
