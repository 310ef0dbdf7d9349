"""Decoders of many families: a prompt and 8 steps equal transformers' whole sequence."""

from __future__ import annotations

import pytest
import torch
from conformance import zoo
from conformance.zoo import transformers

from graphwright.ir.generation.decoder import NoCache
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.trace.capture import TraceWarning

PROMPT, STEPS = 6, 8
PADDING = (0, 3, 5)
"""Tokens of padding in front of each row: a ragged batch."""

FAMILIES = (
    "llama3_rope", "qwen2", "qwen3", "mistral_sliding", "phi", "phi3_longrope",
    "gemma2_softcap", "gemma3_text", "gpt2", "gpt_neox", "opt", "mixtral",
    "qwen3_moe", "falcon_mqa", "bloom_alibi", "olmo2", "cohere_parallel",
    "starcoder2",
)  # fmt: skip


ZOO = zoo.load()
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [4.0, 8.0],
            "rope_theta": 10000.0, "original_max_position_embeddings": 32}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """A tiny random model of a family."""
    if name == "phi3_longrope":
        from conformance.architectures import decoders  # not above: the zoo is in order of imports

        more = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
        return transformers("Phi3ForCausalLM", "Phi3Config", **decoders.LLAMA, **more)().eval()
    return ZOO[name].build().eval()


@pytest.mark.filterwarnings("ignore:texts are limited")
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_steps_are_the_whole(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    program = trace_decoder(model, check=False)
    record = Generation.of(program)
    assert record is not None
    ids = torch.randint(3, 90, (len(PADDING), PROMPT + STEPS))
    mask = torch.arange(PROMPT + STEPS) >= torch.tensor(PADDING)[:, None]
    feeds = {"input_ids": ids, "attention_mask": mask.long()}
    if record.positions:
        feeds["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**feeds, use_cache=False).logits
        found, past, start = [], {}, 0
        for end in range(PROMPT, PROMPT + STEPS + 1):
            outputs = program(
                input_ids=ids[:, start:end], attention_mask=feeds["attention_mask"][:, :end], **past
            )
            past = {a: outputs[b] for a, b in zip(record.past, record.present, strict=True)}
            found.append(outputs["logits"])
            start = end
    error = (torch.cat(found, 1) - expected)[mask].abs().max()
    assert float(error) < 1e-4


def test_texts_of_a_model_that_changes_its_frequencies_are_limited() -> None:
    with pytest.warns(TraceWarning, match="limited to 32 tokens"):
        program = trace_decoder(build("phi3_longrope"), check=False)
    assert program.signature.dims["total"].max == 32


def test_a_model_whose_forward_takes_no_cache_is_told_of() -> None:
    with pytest.raises(NoCache, match="takes no cache"):
        trace_decoder(ZOO["openai_gpt"].build().eval())
