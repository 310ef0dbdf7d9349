"""Parts of a spec's model section that cannot apply to a file are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("declared") / "net.pt2"
    gw.trace(nn.Linear(8, 3), {"input": torch.randn(2, 8)}, {"input": {0: "batch"}}).save(path)
    return path


def compiled(file: Path, model: str, folder: Path) -> object:
    spec = folder / "spec.yaml"
    spec.write_text(f"version: 1\nmodel: {{{model}}}\npasses: [cleanup.canonicalize]\nlower: []\n")
    return gw.optimize(file, spec, out=folder / "out")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("inputs: {input: {dtype: float32, shape: [batch, 9]}}",
         r"has the shape \[batch, 8\], declared is \[batch, 9\]"),
        ("inputs: {input: {dtype: float32, shape: [4, 8]}}", r"declared is \[4, 8\]"),
        ("inputs: {input: {dtype: float32, shape: [batch, width]}}", r"declared is \[batch, width"),
        ("inputs: {input: {dtype: float16, shape: [batch, 8]}}", "is float32, declared is float16"),
        ("inputs: {x: {dtype: float32, shape: [batch, 8]}}", "there is no input 'x', but input"),
        ("inputs: {input: {dtype: float32, shape: [batch, 8], example: [5, 8]}}",
         r"traced with the sizes \[2, 8\], declared is \[5, 8\]"),
        ("inputs: {input: {value: 1.5}}", "cannot be pinned any more"),
        ("state: explicit", "traced with its state frozen"),
        ("factory: nets:build", "model.factory builds the model of a file of weights"),
    ],
)  # fmt: skip
def test_what_a_saved_program_cannot_be_is_refused(
    file: Path, model: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        compiled(file, model, tmp_path)
    assert "Take it out of the spec" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", ["[batch, 8], example: [2, 8]", "[n, 8]"])
def test_inputs_may_be_repeated(file: Path, shape: str, tmp_path: Path) -> None:
    assert compiled(file, f"inputs: {{input: {{dtype: float32, shape: {shape}}}}}", tmp_path)
