"""State that a model writes, in a spec: frozen with a warning, or inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models.streaming import Stream

import graphwright as gw

SPEC = """
version: 1
model:
  factory: models.streaming:Stream
  state: {state}
  inputs: {{x: {{dtype: float32, shape: [1, 4, t], example: [1, 4, 8]}}}}
calibration: {{data: chunks.npz}}
passes: [cleanup.canonicalize, prune.magnitude: {{sparsity: 0.25}}]
lower: [onnxruntime]
"""


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Stream().eval()
    torch.save(model.state_dict(), "model.pt")
    np.savez("chunks.npz", x=np.random.default_rng(0).normal(size=(4, 4, 8)).astype("float32"))
    return model


def test_frozen_state_is_named_in_the_report(stream: Stream) -> None:
    Path("spec.yaml").write_text(SPEC.format(state="frozen"))
    gw.optimize("model.pt", "spec.yaml", out="out")
    said = json.loads(Path("out/report.json").read_text())["warnings"]
    assert any("writes 'cache'" in line and "model: {state: explicit}" in line for line in said)


def test_explicit_state_is_an_input_and_an_output_of_the_artifact(stream: Stream) -> None:
    Path("spec.yaml").write_text(SPEC.format(state="explicit"))
    gw.optimize("model.pt", "spec.yaml", out="out")
    report = json.loads(Path("out/report.json").read_text())
    assert not any("writes 'cache'" in line for line in report["warnings"])
    compiled = gw.load("out")
    cache = torch.ones(1, 4, 2)
    x = torch.randn(1, 4, 8)
    _, state = compiled(x, cache)
    torch.testing.assert_close(state["cache"], x[:, :, -2:])
