"""Layers that keep a state of fixed size: tokens of transformers, prompts and steps alike."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.decoder import NoCache
from graphwright.ir.generation.language_model import LanguageModel
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.ops.selective_scan_state import selective_scan_state

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16}
ATTENTION: dict[str, Any] = {
    "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Lfm2": {**ATTENTION, "num_hidden_layers": 3, "conv_L_cache": 3,
             "layer_types": ["conv", "full_attention", "conv"], "max_position_embeddings": 64},
    "Mamba": {"state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 4},
    "Jamba": {**ATTENTION, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
              "mamba_dt_rank": 4, "mamba_d_conv": 3},
}  # fmt: skip
STATES = {
    "Lfm2": ["past_state_0_conv", "past_state_2_conv"],
    "Mamba": [f"past_state_{i}_{kind}" for i in (0, 1) for kind in ("conv", "recurrent")],
    "Jamba": ["past_state_0_conv", "past_state_0_recurrent"],
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "no_repeat_ngram_size": 1, "do_sample": False}


@cache
def network(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


@cache
def traced(family: str) -> gw.Program:
    return trace_decoder(network(family))


def prompts() -> list[list[int]]:
    drawn = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    return [drawn[0].tolist(), drawn[1, :4].tolist()]


def expected(family: str) -> list[list[int]]:
    """Each prompt alone: a state would see padding."""
    net = network(family)
    found = [net.generate(torch.tensor([p]), eos_token_id=None, **OPTIONS) for p in prompts()]
    return [ids[0, len(p) :].tolist() for ids, p in zip(found, prompts(), strict=True)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tokens_are_those_of_transformers(family: str) -> None:
    program = traced(family)
    record = Generation.of(program)
    assert record is not None
    assert [past for past, _ in record.states] == STATES[family]
    assert {"batch", "seq"} <= set(program.signature.dims)

    def run(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(program.module(*inputs))

    runner = ConcatRunner(record, program.signature, run)
    free = Generation.from_json({**record.to_json(), "eos": ()})
    found = LanguageModel(free, lambda: runner, None).generate(prompts(), **OPTIONS)
    assert [c.ids for c in found] == expected(family)  # type: ignore[union-attr]


def test_a_scan_is_one_node_whose_state_goes_in_and_out_of_the_artifact() -> None:
    program = traced("Mamba")
    assert [n.target for n in program.graph.nodes].count(selective_scan_state) == 2
    lowered = gw.lower(program, "onnxruntime")
    assert lowered.notes["kernels"]["Scan"] == 2
    assert lowered.generation is not None
    lowered.generation = Generation.from_json({**lowered.generation.to_json(), "eos": ()})
    found = lowered.generate(prompts(), **OPTIONS)
    assert [c.ids for c in found] == expected("Mamba")  # type: ignore[union-attr]


def test_what_keeps_keys_and_a_state_in_one_layer_is_refused() -> None:
    import transformers

    config = transformers.FalconH1Config(
        **SIZES, **ATTENTION, num_hidden_layers=1, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8,
        mamba_d_state=4, mamba_n_groups=1,
    )  # fmt: skip
    with pytest.raises(NoCache, match="layer 0 keeps keys, values and a state"):
        trace_decoder(transformers.FalconH1ForCausalLM(config).eval())
