"""Capped attention and sinks: one node per layer, and the logits of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.layers.heads import attention_heads, attentions
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops.attention import attention

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


@cache
def network(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    more: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
    if family == "Gemma2":
        more = {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}
    elif family == "GptOss":
        more["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return ids, mask


@cache
def program(family: str) -> gw.Program:
    ids, mask = inputs(2, 9)
    mask = torch.ones_like(mask)  # which transformers leaves out where it can
    free = {0: "batch", 1: "seq"}
    return gw.trace(
        network(family),
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": free, "attention_mask": free},
    )


def logits(result: Any) -> Tensor:
    return (result["logits"] if isinstance(result, dict) else result.logits).detach()


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
@pytest.mark.parametrize("backend", [None, "onnxruntime", "triton"])
def test_logits_are_those_of_the_written_out_attention(family: str, backend: str | None) -> None:
    model, traced = network(family), program(family)
    run: Any = traced if backend is None else gw.lower(traced, backend)
    assert [node.target for node in traced.graph.nodes].count(attention) == 2
    assert model.config._attn_implementation == "eager"
    for batch, length in ((3, 13), (1, 1)):
        ids, mask = inputs(batch, length)
        wanted = logits(model(ids, attention_mask=mask))
        real = mask.bool()
        torch.testing.assert_close(logits(run(ids, mask))[real], wanted[real], rtol=1e-4, atol=1e-4)
    if backend == "onnxruntime":
        assert [row["op"] for row in run.notes["left"]].count("attention") == 2


def test_keys_are_not_repeated_and_heads_are_found() -> None:
    traced = program("Gemma2")
    for query, key, _ in attentions(traced.graph):
        assert (query.meta["val"].shape[1], key.meta["val"].shape[1]) == (4, 2)
    found = attention_heads(traced, layers(traced, ("linear",)))
    by_role = {role: len(heads) for layer in found.values() for role, heads in layer.items()}
    assert by_role == {"q": 4, "k": 2, "v": 2}


def test_models_that_aten_serves_keep_its_call() -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    traced = gw.trace(model, {"input_ids": inputs(2, 5)[0]})
    assert attention not in [node.target for node in traced.graph.nodes]
    assert len(attentions(traced.graph)) == 2
