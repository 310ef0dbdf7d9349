"""Weights in training checkpoints: found where they fit, named where there is a choice."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model


def build(width: int = 6) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(OrderedDict(first=nn.Linear(4, width), norm=nn.BatchNorm1d(width)))


@pytest.fixture(autouse=True)
def _factory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nested_nets")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nested_nets", module)


def state(change: float = 1.0) -> dict[str, torch.Tensor]:
    return {k: v * change if v.is_floating_point() else v for k, v in build().state_dict().items()}


OWN, OTHER = state(2.0), state(3.0)
SMALL = {"first.weight": torch.ones(2, 4), "first.bias": torch.ones(2)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in OWN.items()}


def loaded(value: Any, tmp_path: Path, **section: Any) -> Any:
    torch.save(value, tmp_path / "m.pt")
    return load_model(tmp_path / "m.pt", section={"factory": "nested_nets:build", **section})


@pytest.mark.parametrize(
    ("value", "section", "says"),
    [
        ({"state_dict": OWN, "best_acc1": torch.tensor(7.0)}, {}, "from 'state_dict'"),
        ({"model": OWN, "rng": torch.zeros(9, dtype=torch.uint8)}, {}, "left aside: rng"),
        ({"step": 3, "model_state": OWN, "optimizer_state": {"state": {0: {"m": torch.ones(2)}},
          "param_groups": []}}, {}, "from 'model_state'"),
        ({"generator": OWN, "discriminator": SMALL}, {}, "from 'generator'"),
        ({"state": {"student": OWN}, "loss": torch.ones(3)}, {}, "from 'state.student'"),
        ({"model": OWN, "model_ema": OTHER}, {}, "averaged weights are there too"),
        ({"params": OWN, "params_ema": OTHER}, {}, "under 'params_ema'"),
        ({"params_ema": OWN}, {}, "from 'params_ema'"),
        ({"model": OTHER, "ema": OWN}, {"key": "ema"}, "from 'ema'"),
        ({"student": OWN, "teacher": OTHER}, {"key": "student"}, "from 'student'"),
        (prefixed("module.module."), {}, "'module.module.' was taken off all"),
        ({"state_dict": {**prefixed("model."), "loss.weight": torch.ones(2)}}, {},
         "1 tensor without it left aside: loss.weight"),
        ({"n_averaged": torch.tensor(3), **prefixed("module.")}, {}, "left aside: n_averaged"),
        ({**prefixed("net.backbone."), "net.head": torch.ones(2)},
         {"strip_prefix": "net.backbone."}, "left aside: net.head"),
        ({**OWN, "similarity": torch.ones(1)}, {}, "1 of the file): similarity"),
        ({k: v for k, v in OWN.items() if "num_batches" not in k}, {}, ""),
    ],
)  # fmt: skip
def test_the_weights_are_found(value: Any, section: Any, says: str, tmp_path: Path) -> None:
    found = loaded(value, tmp_path, **section)
    kept = {n: t for n, t in OWN.items() if "num_batches" not in n}
    for name, tensor in found.module.state_dict().items():
        assert name not in kept or torch.equal(tensor, kept[name])
    assert any(says in text for text in found.warnings) or not says, found.warnings


LESS = {name: tensor for name, tensor in OWN.items() if name != "first.bias"}


@pytest.mark.parametrize(
    ("value", "section", "says"),
    [
        ({"student": OWN, "teacher": OTHER}, {}, ["key: 'student'", "model: {key: ...}"]),
        ({"model": OWN}, {"key": "nothing"}, ["under the key 'nothing'", "under 'model'"]),
        ({"model": LESS, "step": 1}, {}, ["1 of its 7 tensors", "missing: first.bias"]),
        ({"a": LESS, "b": SMALL, "c": {"x": torch.ones(1)}}, {}, ["'a': 6 tensors, 1 of"]),
        (prefixed("encoder."), {}, ["say model: {strip_prefix: encoder.}"]),
        (OWN, {"strip_prefix": "encoder."}, ["no tensor of the file has the prefix 'encoder.'"]),
        ({**OWN, "first.bias": torch.ones(5)}, {}, ["first.bias: (5,) in the file, (6,)"]),
        ({"epoch": 3}, {}, ["no tensors by name", "key: epoch"]),
        ({"state": {0: {"m": torch.ones(2)}}, "param_groups": []}, {}, ["of an optimizer"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    value: Any, section: Any, says: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        loaded(value, tmp_path, **section)
    for text in says:
        assert text in str(caught.value)


def test_modules_in_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"model": build(), "ema": build(5), "epoch": 1}, tmp_path / "m.pt")
    found = load_model(tmp_path / "m.pt", allow_pickle=True)
    assert found.module is not None
    assert found.module.first.out_features == 6  # type: ignore[union-attr]
    assert any("under 'ema'" in text for text in found.warnings)
    found = load_model(tmp_path / "m.pt", allow_pickle=True, section={"key": "ema"})
    assert found.module.first.out_features == 5  # type: ignore[union-attr]


def test_a_key_is_for_checkpoints_only(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(OWN, tmp_path / "m")
    with pytest.raises(ModelError, match=r"model.key .* this is a safetensors file"):
        load_model(tmp_path / "m", section={"factory": "nested_nets:build", "key": "model"})
