"""Compensation in a chain goes by the weights that were compressed, whatever came before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.cli import main

HEAD = """version: 1
calibration: {data: data.npz, batch_size: 16}
training: {data: data.npz, batch_size: 16}
passes:
"""
COMPRESS = "  - quantize.rtn: {bits: 3, block: 16}\n"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.norm, self.body, self.head = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.stem(x)).mean((2, 3))
        return self.head(torch.relu(self.body(self.norm(x))))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(48, 2, 8, 8) * torch.tensor([1.0, 3.0])[:, None, None]
    for norm in (net.stem[1], net.mix[1]):
        nn.init.uniform_(norm.weight, 0.2, 4.0)
    for _ in range(60):
        net(x)  # running statistics
    program = gw.trace(net.eval(), {"x": x[:4]}, dynamic={"x": {0: "n"}})
    program.save(tmp_path / "model.pt2")
    labels = np.random.default_rng(0).integers(0, 4, len(x))
    np.savez(tmp_path / "data.npz", x=x.numpy(), labels=labels)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(folder: Path, passes: str, out: str = "out", *more: str) -> dict[str, Any]:
    (folder / "spec.yaml").write_text(HEAD + passes + "lower: []\n")
    code = main(["optimize", "model.pt2", "--spec", "spec.yaml", "--out", out, "--quiet", *more])
    assert code == 0
    found: dict[str, Any] = json.loads((folder / out / "report.json").read_text())
    return found


def errors(folder: Path, before: str, compress: str, after: str) -> tuple[float, float, Any]:
    """Distance of the outputs from the float program's, compressed and compensated; the report."""
    chains = {"float": "", "compressed": compress, "compensated": f"{compress}  - {after}\n"}
    x = torch.from_numpy(np.load(folder / "data.npz")["x"])
    outputs = {}
    for name, chain in chains.items():
        found = report(folder, before + chain, name)
        with torch.no_grad():
            outputs[name] = gw.load(folder / name / "program.pt2")(x)
    off = {name: float((y - outputs["float"]).norm()) for name, y in outputs.items()}
    return off["compressed"], off["compensated"], found


@pytest.mark.parametrize(
    "before",
    [
        "  - cleanup.fold_batch_norm\n",
        "  - cleanup.fold_batch_norm\n  - prune.zig: {sparsity: 0.4}\n",
        "  - tune.finetune: {tune: {steps: 20, lr: 0.02}}\n  - cleanup.fold_batch_norm\n",
        "  - cleanup.fold_batch_norm\n  - quantize.smoothquant\n",
        "  - cleanup.fold_batch_norm\n  - prune.magnitude\n  - quantize.smoothquant\n",
        "  - cleanup.fold_batch_norm\n  - prune.magnitude\n  - prune.zig: {sparsity: 0.4}\n",
    ],
    ids=["folded", "cut", "trained", "smoothed", "sparse, smoothed", "sparse, cut"],
)
@pytest.mark.parametrize(
    "after",
    ["compensate.eora: {rank: 4}", "compensate.svd: {rank: 4}", "compensate.bias_correction"],
)
def test_the_error_of_the_compressed_weights_is_undone(
    folder: Path, before: str, after: str
) -> None:
    compressed, compensated, found = errors(folder, before, COMPRESS, after)
    reasons = [reason for _, _, reason, _ in found["passes"][-1]["actions"]]
    assert not [reason for reason in reasons if "was" in reason or "original" in reason]
    assert compensated < compressed


@pytest.mark.parametrize("before", ["", "  - prune.magnitude\n"], ids=["dense", "sparse"])
def test_awq_is_compensated_for_the_weights_that_its_factors_made(
    folder: Path, before: str
) -> None:
    compressed, compensated, found = errors(
        folder, "  - cleanup.fold_batch_norm\n" + before,
        "  - quantize.awq: {bits: 3, block: 16}\n",
        "compensate.eora: {rank: 4}",
    )  # fmt: skip
    assert any(", folded, alpha" in what for _, what, _, _ in found["passes"][-2]["actions"])
    assert compensated < compressed


def test_pruning_and_rounding_are_compensated_together(folder: Path) -> None:
    compressed, compensated, _ = errors(
        folder, "  - cleanup.fold_batch_norm\n", "  - prune.magnitude\n" + COMPRESS,
        "compensate.eora: {rank: 8}",
    )  # fmt: skip
    assert compensated < compressed


def test_a_run_that_goes_on_knows_them_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = "  - cleanup.fold_batch_norm\n" + COMPRESS + "  - compensate.eora: {rank: 4}\n"
    report(folder, passes, "whole")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gw.passes.compensate.Eora, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            gw.optimize("model.pt2", "spec.yaml", out="again", checkpoint_seconds=0.0)
    gw.optimize("model.pt2", "spec.yaml", out="again", checkpoint_seconds=0.0)
    resumed = json.loads((folder / "again" / "report.json").read_text())
    whole = json.loads((folder / "whole" / "report.json").read_text())
    assert resumed["passes"][2]["actions"] == whole["passes"][2]["actions"]
    left, right = (gw.load(folder / out / "program.pt2").state for out in ("again", "whole"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
