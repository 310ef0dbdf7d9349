"""A spec's `export` section writes checkpoints beside the artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.ir.errors import ModelError, SpecError
from graphwright.ir.files import load_model
from graphwright.ir.files.coded.modules import BlocksLinear
from graphwright.specs.spec import parse_spec

SPEC = """
version: 1
passes:
  - quantize.rtn: {block: 16, symmetric: true, targets: ["model.layers.*"]}
export:
  - gptq
  - compressed-tensors: {folder: ct}
  - safetensors
"""


def run(model: Path, text: str, out: Path) -> Any:
    (out.parent / "spec.yaml").write_text(text)
    return gw.optimize(model, out.parent / "spec.yaml", out=out, quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "model"


def test_checkpoints_stand_beside_the_artifacts(folder: Path, tmp_path: Path) -> None:
    outcome = run(folder, SPEC, tmp_path / "out")
    rows = {row["backend"]: row for row in outcome.report["result"]["artifacts"]}
    assert {name: row["path"] for name, row in rows.items()} == {
        "program": "program.pt2", "gptq": "gptq", "compressed-tensors": "ct",
        "safetensors": "safetensors",
    }  # fmt: skip
    ids = torch.randint(0, 48, (2, 8))
    with torch.no_grad():
        wanted = outcome.program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    for name in ("gptq", "ct", "safetensors"):
        written = tmp_path / "out" / name
        assert (written / "tokenizer_config.json").is_file()
        assert (written / "generation_config.json").is_file()
        module = load_model(written).module
        assert module is not None
        torch.testing.assert_close(module(ids).logits, wanted)
        coded = sum(isinstance(m, BlocksLinear) for m in module.modules())
        assert coded == (0 if name == "safetensors" else 7)
    config = json.loads((tmp_path / "out" / "ct" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert rows["gptq"]["file_bytes"] > (tmp_path / "out/gptq/model.safetensors").stat().st_size
    assert "export:" in (tmp_path / "out" / "spec.lock.yaml").read_text()


def test_a_format_without_codes_to_write_ends_the_run_before_the_passes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr("graphwright.job.stages.run_chain", lambda *_: ran.append("chain"))
    spec = "version: 1\npasses: [cleanup.canonicalize]\nexport: [gptq]\n"
    with pytest.raises(ModelError, match="no linear layer in codes") as caught:
        run(folder, spec, tmp_path / "out")
    assert "quantize.rtn" in str(caught.value.fix)
    assert not ran
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_ends_the_run_before_lowering(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[str] = []
    monkeypatch.setattr("graphwright.job.stages.Job._lower", lambda *_: lowered.append("all"))
    spec = (
        "version: 1\npasses: [quantize.int8: {activations: dynamic}]\n"
        "export: [gptq]\nlower: [onnxruntime]\n"
    )
    with pytest.raises(ModelError, match="no linear layer in codes"):
        run(folder, spec, tmp_path / "out")
    assert not lowered
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("[gptq, gptq]", "is that of export"),
        ("[gptq: {folder: a}, awq: {folder: a}]", "is that of export"),
        ("[gptk]", "gptq"),
        ("[gptq: {folder: ../x}]", "folder"),
        ("[gptq: {foldr: x}]", "folder"),
        ("gptq", "list"),
    ],
)
def test_wrong_sections_are_named(export: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_spec(f"version: 1\nexport: {export}\n")
