"""Frequencies that change with a text's length: right within the model's own, which caps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.transformers_nets import llama

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.language_model import LanguageModel
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.trace.capture import TraceWarning

LENGTH = 16


def test_dynamic_frequencies_are_held_and_longer_texts_refused() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    net: Any = llama(max_position_embeddings=LENGTH, rope_parameters=rope, eos_token_id=None)
    with torch.no_grad():
        net(torch.randint(0, 48, (1, LENGTH + 9)))  # leaves the frequencies of a longer text behind
    grown = net.model.rotary_emb.inv_freq.clone()
    with pytest.warns(TraceWarning, match=f"limited to {LENGTH} tokens.*rope_type: dynamic"):
        program = trace_decoder(net)
    assert net.model.rotary_emb.rope_type == "dynamic"
    assert torch.equal(net.model.rotary_emb.inv_freq, grown)
    assert program.signature.dims["total"].max == LENGTH
    record = Generation.of(program)
    assert record is not None

    def run(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(program.module(*inputs))

    model = LanguageModel(record, lambda: ConcatRunner(record, program.signature, run), None)
    ids = torch.randint(0, 48, (1, 7), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": LENGTH - 7, "do_sample": False}
    wanted = net.generate(ids, no_repeat_ngram_size=1, **options)[0, 7:].tolist()
    assert model.generate(ids[0].tolist(), no_repeat_ngram_size=1, **options).ids == wanted  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="context length"):
        model.generate(ids[0].tolist(), max_new_tokens=LENGTH)
