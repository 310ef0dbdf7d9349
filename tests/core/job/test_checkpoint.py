"""A checkpoint only saves time: one that cannot be written or read is told of, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.job.checkpoint import Checkpoints, file_sha256

SPEC = "version: 1\npasses: [cleanup.canonicalize, prune.magnitude]\nlower: []\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    gw.trace(model, (torch.randn(4, 8),), "batch").save("model.pt2")
    Path("spec.yaml").write_text(SPEC)
    return tmp_path


def warned(folder: Path, out: str = "out") -> list[str]:
    warnings: list[str] = json.loads((folder / out / "report.json").read_text())["warnings"]
    return warnings


def test_a_checkpoint_that_cannot_be_written_ends_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ArgumentError("the program cannot be written: node 'odd'")

    monkeypatch.setattr(Checkpoints, "save", refuse)
    gw.optimize("model.pt2", "spec.yaml", out="out", checkpoint_seconds=0.0)
    said = [line for line in warned(folder) if "no checkpoint behind pass" in line]
    assert len(said) == 2
    assert "pass 1 (prune.magnitude): the program cannot be written: node 'odd'" in said[1]


def test_a_checkpoint_that_cannot_be_read_is_told_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gw.passes.prune.Magnitude, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            gw.optimize("model.pt2", "spec.yaml", out="out", checkpoint_seconds=0.0)

    (checkpoint,) = (folder / ".out.graphwright" / "checkpoints").glob("*.pt2")
    manifest = checkpoint.with_name("manifest.json")
    entry = json.loads(manifest.read_text())
    checkpoint.write_bytes(b"no archive")
    entry["files"] = [[checkpoint.name, file_sha256(checkpoint)]]
    manifest.write_text(json.dumps(entry))
    gw.optimize("model.pt2", "spec.yaml", out="out", checkpoint_seconds=0.0)
    assert any("checkpoint of an earlier run cannot be read" in line for line in warned(folder))
