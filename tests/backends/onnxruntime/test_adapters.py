"""One session, many adapters: the factors of a low-rank adapter as inputs of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import layers_program, moved

import graphwright as gw
from graphwright.ir.errors import ArgumentError, LoweringError

TARGETS = ["fc", "plain", "turned"]


def adapted(rank: int, seed: int, **options: Any) -> gw.Program:
    made = gw.passes.adapt.Lora(targets=TARGETS, rank=rank, alpha=6.0, **options)
    return moved(made(layers_program()), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    compiled = gw.lower(adapted(4, 1), "onnxruntime", adapters="switchable")
    compiled.save(place)
    gw.save_onnx_adapter(adapted(2, 2), place / "other.onnx_adapter")
    return place


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


def test_adapters_of_any_rank_and_the_base_run_in_one_session(folder: Path) -> None:
    served = gw.load(folder)
    assert [i.name for i in served.session.get_inputs()] == ["x"]
    x = torch.randn(5, 8, 10)
    wanted = {
        None: adapted(4, 1)(x),
        folder / "adapters" / "default.onnx_adapter": adapted(4, 1)(x),
        folder / "adapters" / "base.onnx_adapter": layers_program()(x),
        folder / "other.onnx_adapter": adapted(2, 2)(x),
    }
    assert not torch.allclose(wanted[None], wanted[folder / "other.onnx_adapter"], rtol=0.05)
    for _ in range(5):  # no state is left from one run to the next
        for path, expected in wanted.items():
            served.use_adapter(path)
            close(served(x), expected)


def test_an_adapter_of_other_weights_or_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    served = gw.load(folder)
    strange = gw.passes.adapt.Lora(targets=TARGETS, rank=2)(moved(layers_program()))
    gw.save_onnx_adapter(strange, tmp_path / "strange.onnx_adapter")
    with pytest.raises(ArgumentError, match="other base weights"):
        served.use_adapter(tmp_path / "strange.onnx_adapter")
    (tmp_path / "broken.onnx_adapter").write_bytes(b"no flatbuffer")
    with pytest.raises(ArgumentError, match="no file of an adapter"):
        served.use_adapter(tmp_path / "broken.onnx_adapter")
    plain = gw.lower(layers_program(), "onnxruntime")
    with pytest.raises(ArgumentError, match="takes no adapters"):
        plain.use_adapter(folder / "other.onnx_adapter")


def test_cores_and_quantized_bases_switch_too(tmp_path: Path) -> None:
    coded = gw.passes.quantize.Rtn(bits=8, block=16, targets=["fc"])(layers_program())
    one = moved(gw.passes.adapt.LoraXs(targets=["plain"], rank=3)(coded), size=0.1)
    compiled = gw.lower(one, "onnxruntime", adapters="switchable", accuracy_level=1)
    x = torch.randn(5, 8, 10)
    close(compiled(x), one(x))
    other = moved(gw.passes.adapt.Pego(targets=["fc"], rank=1, count=2)(coded), size=0.1)
    gw.save_onnx_adapter(other, tmp_path / "other.onnx_adapter")
    with pytest.raises(ArgumentError):
        compiled.use_adapter(tmp_path / "other.onnx_adapter")


@pytest.mark.parametrize("kind", ["Ia3", "Dora", "Krona"])
def test_what_is_no_low_rank_change_is_refused(kind: str) -> None:
    options = {"factor_out": 2, "factor_in": 2} if kind == "Krona" else {}
    made = getattr(gw.passes.adapt, kind)(targets=["fc"], **options)(layers_program())
    with pytest.raises(LoweringError, match="low-rank"):
        gw.lower(made, "onnxruntime", adapters="switchable")
    with pytest.raises(LoweringError, match="has 0"):
        gw.lower(layers_program(), "onnxruntime", adapters="switchable")
