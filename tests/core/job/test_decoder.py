"""A folder of a causal language model, compiled with its cache by the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graphwright as gw
from graphwright.commands.opening import open_program
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.generation.record import Generation
from graphwright.ir.trace.capture import TraceWarning

CONFIG: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
SPEC = """
version: 1
calibration: {data: texts.npz}
passes: [{quantize.gptq: {bits: 4, block: 16}}]
lower: [onnxruntime]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


def spec_of(folder: Path, text: str) -> str:
    """Writes a spec, and gives its path."""
    path = folder.parent / "spec.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def outcome(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import numpy as np

    place = tmp_path_factory.mktemp("job")
    ids = np.random.default_rng(0).integers(3, 100, (8, 12))
    np.savez(place / "texts.npz", input_ids=ids)
    (place / "spec.yaml").write_text(SPEC)
    return gw.optimize(folder, place / "spec.yaml", out=place / "out")


def test_a_chain_sees_the_layers_it_knows(outcome: Any) -> None:
    (row,) = outcome.report["passes"]
    changed = {layer for layer, *_, was in row["actions"] if was}
    assert "model.layers.0.self_attn.q_proj" in changed


def test_the_report_has_the_decode_check(outcome: Any) -> None:
    (artifact,) = outcome.report["result"]["artifacts"]
    assert artifact["decode"] < 1e-4
    assert outcome.report["passes"][0]["decode"] < 1e-4


def test_the_record(outcome: Any, folder: Path) -> None:
    record = Generation.of(outcome.program)
    assert record is not None
    assert (record.bos, record.eos, record.pad) == (1, (2, 3), 0)
    assert (record.context_length, record.vocab_size) == (64, 100)
    assert record.tokenizer == str(folder)


def test_a_text_longer_than_the_context_is_refused(outcome: Any) -> None:
    with pytest.raises(ArgumentError, match="'total' of input 'attention_mask' is 65"):
        outcome.program(input_ids=torch.zeros(1, 65, dtype=torch.int64))


def test_plain_logits_are_one_option_away(folder: Path) -> None:
    spec = spec_of(folder, "version: 1\nmodel: {task: logits}\nlower: [onnxruntime]\n")
    program = open_program(folder, spec=spec, allow_pickle=False)
    assert [s.name for s in program.signature.inputs] == ["input_ids", "attention_mask"]
    assert Generation.of(program) is None


def test_a_model_without_a_cache_is_traced_as_plain_logits(tmp_path: Path) -> None:
    config = transformers.OpenAIGPTConfig(
        vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "gpt")
    with pytest.warns(TraceWarning, match="plain logits, without a cache: its forward takes no"):
        program = open_program(tmp_path / "gpt", spec=None, allow_pickle=False)
    assert Generation.of(program) is None


def test_declared_inputs_beside_the_task_are_refused(folder: Path) -> None:
    inputs = "{input_ids: {dtype: int64, shape: [2, 8]}}"
    text = f"version: 1\nmodel: {{task: generation, inputs: {inputs}}}\nlower: [onnxruntime]\n"
    with pytest.raises(ModelError, match="follow from the model"):
        open_program(folder, spec=spec_of(folder, text), allow_pickle=False)
