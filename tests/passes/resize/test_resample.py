"""resize.resample: what it makes is tested with resize.neumeta; here, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import every_pass
from safetensors.torch import save_file

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.resize import Neumeta, Resample


@pytest.fixture(scope="module")
def manifold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifold") / "m.safetensors"
    program = every_pass.traced("text")
    options = {"targets": ["up"], "hidden": 8, "frequencies": 2, "draws": 2, "save": str(path),
               "tune": {"steps": 1, "loss": "teacher_mse"}}  # fmt: skip
    Neumeta(**options)(program, training=every_pass.batches("text"), check=False)
    return path


def test_every_width_by_one_channel(manifold: Path) -> None:
    program = every_pass.traced("text")
    for kept in (16, 17, 24, 32):
        small = Resample(manifold=str(manifold), width=kept / 32, draws=1)(program)
        assert small.state["up.weight"].shape == (kept, 16)
        assert small.state["down.weight"].shape == (16, kept)


def test_beyond_the_widths_of_training(manifold: Path) -> None:
    with pytest.raises(ArgumentError, match=r"outside of 0.5 to 1"):
        Resample(manifold=str(manifold), width=0.4)(every_pass.traced("text"))


def test_of_another_program(manifold: Path) -> None:
    program = every_pass.traced("text")
    state = {**program.state, "up.bias": torch.nn.Parameter(program.state["up.bias"] + 1)}
    with pytest.raises(ModelError, match="another program"):
        Resample(manifold=str(manifold))(program.replace(state=state))


@pytest.mark.parametrize("kind", ["missing", "cut off", "other"])
def test_files_that_are_no_manifold(kind: str, manifold: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    if kind == "cut off":
        path.write_bytes(manifold.read_bytes()[:-100])
    elif kind == "other":
        save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="manifold") as caught:
        Resample(manifold=str(path))(every_pass.traced("text"))
    assert str(path) in str(caught.value.where)
