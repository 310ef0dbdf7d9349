"""Large models: converted weights and new tensors lie in mapped files, with the same values."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny_decoder import write
from torch import nn

import graphwright as gw
from graphwright.ir.files import hugging_face, load_model, mapped
from graphwright.ir.files.mapped import is_mapped, mapped_copy, new_tensors_mapped
from graphwright.ir.generation.model_facts import ModelFacts
from graphwright.ir.graph.digest import digest


def folder_in_bf16(path: Path) -> Path:
    pytest.importorskip("transformers")
    model = write(path).to(torch.bfloat16)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "IN_MEMORY", 0)
    monkeypatch.setattr(mapped, "IN_MEMORY", 0)
    monkeypatch.setattr(mapped, "SMALL", 1)


def test_a_folder_is_converted_into_files_and_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_in_bf16(tmp_path)

    def loaded() -> Any:
        return load_model(folder, section={"dtype": "float32"}).module

    plain = loaded()
    assert not any(map(is_mapped, plain.parameters()))
    everything_is_large(monkeypatch)
    large = loaded()
    assert all(map(is_mapped, large.parameters()))
    tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (plain, large)]
    assert list(tensors[0]) == list(tensors[1])
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert tensor.dtype is other.dtype
        assert torch.equal(tensor, other), name
        assert tensor.requires_grad == other.requires_grad
    assert plain.generation_config.to_dict() == large.generation_config.to_dict()
    assert ModelFacts.of(plain, folder) == ModelFacts.of(large, folder)


def test_a_copy_is_in_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    value = torch.randn(7, 5)
    copy = mapped_copy(value.t(), torch.float64)
    assert is_mapped(copy)
    assert not list(tmp_path.iterdir())
    assert torch.equal(copy, value.t().double())


def test_a_full_disk_leaves_tensors_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapped, "_reserve", full)
    monkeypatch.setattr(mapped, "SMALL", 1)
    weights = {"w": torch.randn(3, 3).bfloat16()}
    found = mapped.in_dtype(weights, torch.float32)["w"]
    assert not is_mapped(found)
    assert torch.equal(found, weights["w"].float())


def test_new_tensors_of_a_program_move_and_shared_ones_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    before = gw.trace(model, (torch.randn(2, 64),))
    after = gw.passes.quantize.Rtn(bits=4, block=32, targets=["0"])(before)
    everything_is_large(monkeypatch)
    moved = new_tensors_mapped(before, after)
    assert list(moved.state) == list(after.state)
    for name, tensor in moved.state.items():
        assert torch.equal(tensor, after.state[name])
        assert is_mapped(tensor) != (name in before.state)
        assert (tensor is after.state[name]) == (name in before.state)
    assert digest(moved) == digest(after)
    assert new_tensors_mapped(before, moved) is moved
