"""A CNN trained on real digits, saved in every accepted format, through the main job."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import graphwright as gw
from graphwright.cli import optimize_main
from graphwright.ir.errors import ModelError

HERE = Path(__file__).parent


def _digits() -> Any:
    """The neighbouring file as a module that a spec's `factory` can name."""
    if "digits_of_tests" not in sys.modules:
        path = HERE / "digits.py"
        module_spec = importlib.util.spec_from_file_location("digits_of_tests", path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules["digits_of_tests"] = module
        module_spec.loader.exec_module(module)
    return sys.modules["digits_of_tests"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out and calibration data, and the trained model."""
    folder = tmp_path_factory.mktemp("digits")
    images, _, held_out, labels = _digits().data()
    np.savez(folder / "calibration.npz", x=images[:128].numpy())
    np.savez(folder / "held_out.npz", x=held_out.numpy(), labels=labels.numpy())
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return _digits().trained()


def save_program(model: torch.nn.Module, path: Path) -> None:
    gw.trace(model, (torch.rand(4, 1, 8, 8),), {"x": {0: "batch"}}).save(path)


def save_export(model: torch.nn.Module, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        exported = torch.export.export(
            model, (torch.rand(4, 1, 8, 8),), dynamic_shapes={"x": {0: batch}}
        )
    torch.export.save(exported, path)


def save_trace(model: torch.nn.Module, path: Path) -> None:
    torch.jit.trace(model, torch.rand(4, 1, 8, 8)).save(str(path))


def save_script(model: torch.nn.Module, path: Path) -> None:
    torch.jit.script(model).save(str(path))


FORMATS: dict[str, tuple[str, Callable[[Any, Path], None], tuple[str, ...]]] = {
    "our program": ("m.pt2", save_program, ()),
    "torch.export": ("m.pt2", save_export, ()),
    "TorchScript, traced": ("m.pt", save_trace, ()),
    "TorchScript, scripted": ("m.pt", save_script, ()),
    "pickled module": ("m.pt", torch.save, ("--allow-pickle",)),
    "state dict": ("m.pt", lambda m, p: torch.save(m.state_dict(), p), ("factory",)),
    "state dict, old format": (
        "m.pth",
        lambda m, p: torch.save(m.state_dict(), p, _use_new_zipfile_serialization=False),
        ("factory",),
    ),
    "checkpoint with an optimizer": (
        "m.ckpt",
        lambda m, p: torch.save({"state_dict": m.state_dict(), "epoch": 6}, p),
        ("factory",),
    ),
    "safetensors": (
        "m.safetensors",
        lambda m, p: safetensors.torch.save_file(m.state_dict(), p),
        ("factory",),
    ),
}

SPEC = """
version: 1
model:
  {factory}
  inputs: {{x: {{dtype: float32, shape: [batch, 1, 8, 8], example: [4, 1, 8, 8], range: [0, 1]}}}}
calibration: {{data: calibration.npz, batch_size: 32}}
evaluate: {{data: held_out.npz, metric: accuracy, batch_size: 64}}
require: {{max_drop: 0.01}}
passes:
  - cleanup.fold_batch_norm
  - quantize.int8: {{activations: static}}
lower: [onnxruntime]
"""


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_compiles_to_the_same_int8_classifier(
    name: str, folder: Path, model: torch.nn.Module, tmp_path: Path
) -> None:
    file, save, extra = FORMATS[name]
    save(model, tmp_path / file)
    factory = "factory: 'digits_of_tests:build'" if "factory" in extra else ""
    (folder / "spec.yaml").write_text(SPEC.format(factory=factory))
    flags = [flag for flag in extra if flag.startswith("--")]
    out = tmp_path / "out"
    arguments = [str(tmp_path / file), "--spec", str(folder / "spec.yaml"), "--out", str(out)]
    assert optimize_main([*arguments, *flags, "--quiet"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"]["before"] > 0.95
    assert report["evaluation"]["drop"] <= 0.01
    assert (out / "model.onnx").stat().st_size < 20_000
    batch = 4 if name.startswith("TorchScript") else 7  # a TorchScript file fixes its sizes
    logits = gw.load(out / "model.onnx")(torch.rand(batch, 1, 8, 8))
    assert tuple(logits.shape) == (batch, 10)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        gw.load(tmp_path / "model.pt2")
