"""Scalars that a spec pins are part of the program: numbers, texts, or scalar tensors."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError, SpecError

X = torch.arange(12.0).reshape(2, 6)


class Resampled(nn.Module):
    """As a voice detector: its code branches on the rate."""

    def forward(self, x: torch.Tensor, rate: int, loud: bool = False) -> torch.Tensor:
        if rate != 16000:
            raise ValueError("only 16000 is supported")
        return x * (2.0 if loud else 1.0) + rate


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x, t, mode="add"):  # type: ignore[no-untyped-def]
        t = t.to(x.dtype) if isinstance(t, torch.Tensor) else t
        return x * self.scale + t if mode == "add" else x * self.scale * t


@pytest.fixture(autouse=True)
def _factory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pinned_nets")
    module.build = Plain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pinned_nets", module)


def scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Resampled()), folder / "m.pt")
    return folder / "m.pt"


def plain(folder: Path) -> Path:
    torch.save(Plain().state_dict(), folder / "w.pt")
    return folder / "w.pt"


def compiled(file: Path, inputs: str, head: str = "") -> Any:
    spec = file.with_suffix(".yaml")
    x = "x: {dtype: float32, shape: [batch, 6], example: [2, 6]}"
    spec.write_text(
        f"version: 1\nmodel:\n  {head or 'kwargs: {}'}\n  inputs: {{{x}, {inputs}}}\n"
        "lower: [onnxruntime]\n"
    )
    return gw.optimize(file, spec, out=file.parent / "out")


@pytest.mark.parametrize(
    "rate",
    ["{value: 16000}", "{dtype: int64, shape: [], value: 16000}",
     "{dtype: int64, shape: [], range: [16000, 16000]}"],
)  # fmt: skip
def test_torchscript_is_given_the_number_it_wants(rate: str, tmp_path: Path) -> None:
    outcome = compiled(scripted(tmp_path), f"rate: {rate}, loud: {{value: true}}")
    assert [spec.name for spec in outcome.program.signature.inputs] == ["x"]
    torch.testing.assert_close(outcome.compiled["onnxruntime"](X), X * 2 + 16000)
    assert outcome.report["latency"]


def test_the_refusals_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes 'rate' as a number \(int\)") as caught:
        compiled(scripted(tmp_path), "rate: {dtype: int64, shape: []}")
    assert "{rate: {value: ...}}" in caught.value.fix
    with pytest.raises(ModelError, match="only 16000 is supported"):
        compiled(scripted(tmp_path), "rate: {value: 8000}")
    with pytest.raises(ModelError, match=r"takes 'rate' as int, and it is pinned at 0.5"):
        compiled(scripted(tmp_path), "rate: {value: 0.5}")


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ("t: {value: 3}", X * 2 + 3),
        ("t: {dtype: int64, shape: [], value: 3}", X * 2 + 3),
        ("t: {value: 3.5}, mode: {value: times}", X * 7),
    ],
)
def test_a_module_is_given_a_number_a_text_or_a_tensor(
    inputs: str, wanted: torch.Tensor, tmp_path: Path
) -> None:
    outcome = compiled(plain(tmp_path), inputs, "factory: pinned_nets:build")
    assert [spec.name for spec in outcome.program.signature.inputs] == ["x"]
    torch.testing.assert_close(outcome.compiled["onnxruntime"](X), wanted)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("t: {dtype: int64}", "needs 'shape'"),
        ("t: {shape: []}", "needs 'dtype'"),
        ("t: {dtype: int64, value: 3}", "a pinned tensor needs 'shape' too"),
        ("t: {dtype: int64, shape: [2], value: 3}", "only a scalar can be pinned"),
        ("t: {value: 3, range: [0, 2]}", "'value' leaves nothing to range"),
        ("t: {dtype: int64, shape: [2], range: [3, 3]}", "low < high"),
    ],
)
def test_specs_that_are_refused(inputs: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        compiled(plain(tmp_path), inputs, "factory: pinned_nets:build")
    assert says in str(caught.value)
