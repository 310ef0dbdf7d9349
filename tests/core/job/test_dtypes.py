"""A model is compiled in a dtype that its backends and passes run, and the run says so."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError, SpecError

X = torch.linspace(-1, 1, 8 * 32).reshape(8, 32)
INPUTS = "x: {dtype: float32, shape: [batch, 32], example: [2, 32]}"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.up(x)).to(self.up.weight.dtype)
        return self.down(h + torch.zeros((), dtype=h.dtype)).softmax(-1)


@pytest.fixture(autouse=True)
def _factory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("dtype_nets")
    module.build = lambda dtype: Net().to(getattr(torch, dtype))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dtype_nets", module)


def weights(folder: Path, dtype: str) -> Path:
    """A file of weights in a dtype."""
    state = Net().to(getattr(torch, dtype)).state_dict()
    safetensors.torch.save_file(state, folder / f"{dtype}.safetensors")
    return folder / f"{dtype}.safetensors"


def exported(folder: Path, dtype: str) -> Path:
    """An export archive in a dtype, inputs included."""
    kind = getattr(torch, dtype)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Net().eval().to(kind), (X[:2].to(kind),), dynamic_shapes={"x": {0: batch}}
    )
    torch.export.save(program, folder / "m.pt2")
    return folder / "m.pt2"


def compiled(
    file: Path, stored: str, passes: str = "[]", model: str = "", inputs: str = INPUTS,
    lower: str = "onnxruntime",
) -> Any:  # fmt: skip
    factory = f"factory: dtype_nets:build, kwargs: {{dtype: {stored}}}, " if stored else ""
    spec = file.with_suffix(".yaml")
    inputs = f"inputs: {{{inputs}}}, " if inputs else ""
    spec.write_text(
        f"version: 1\nmodel: {{{factory}{inputs}{model}}}\npasses: {passes}\nlower: [{lower}]\n"
    )
    return gw.optimize(file, spec, out=file.parent / "out")


@pytest.mark.parametrize(
    ("stored", "passes", "why"),
    [
        ("bfloat16", "[]", "onnxruntime does not run bfloat16"),
        ("float16", "[quantize.int8: {activations: dynamic}]", "quantize.int8 does not take"),
    ],
)
def test_float32_takes_the_place_of_what_does_not_run(
    stored: str, passes: str, why: str, tmp_path: Path
) -> None:
    outcome = compiled(weights(tmp_path, stored), stored, passes)
    assert any(f"stored in {stored} and compiled in float32" in w and why in w
               for w in outcome.report["warnings"])  # fmt: skip
    kinds = {t.dtype for t in outcome.program.state.values() if t.is_floating_point()}
    assert kinds == {torch.float32}
    wide = Net().to(getattr(torch, stored)).float()
    loss = 2e-2 if passes != "[]" else 1e-6
    torch.testing.assert_close(outcome.compiled["onnxruntime"](X), wide(X), rtol=loss, atol=loss)


def test_what_runs_stays_as_it_is_stored(tmp_path: Path) -> None:
    half = INPUTS.replace("float32", "bfloat16")
    outcome = compiled(weights(tmp_path, "bfloat16"), "bfloat16", inputs=half, lower="triton")
    assert {t.dtype for t in outcome.program.state.values()} == {torch.bfloat16}
    assert outcome.report["warnings"] == []


def test_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """Inputs declared in the stored dtype follow; what no backend runs is refused by its line."""
    outcome = compiled(weights(tmp_path, "float32"), "float32", model="dtype: float16")
    assert [spec.dtype for spec in outcome.program.signature.inputs] == ["float16"]
    assert any("compiled in float16, as asked" in text for text in outcome.report["warnings"])
    y = outcome.compiled["onnxruntime"](X.half())
    torch.testing.assert_close(y.float(), Net()(X), rtol=2e-3, atol=2e-3)
    with pytest.raises(SpecError, match="onnxruntime does not run bfloat16") as caught:
        compiled(weights(tmp_path, "float32"), "float32", model="dtype: bfloat16")
    assert caught.value.problems[0].line == 2


def test_a_graph_of_fixed_dtypes_is_converted_once_it_is_traced(tmp_path: Path) -> None:
    outcome = compiled(exported(tmp_path, "bfloat16"), "", inputs="")
    assert [spec.dtype for spec in outcome.program.signature.inputs] == ["float32"]
    assert any("compiled in float32" in text for text in outcome.report["warnings"])
    wide = Net().bfloat16().float()
    torch.testing.assert_close(outcome.compiled["onnxruntime"](X), wide(X), rtol=1e-6, atol=1e-6)
    with pytest.raises(ModelError, match=r"begin the passes with cast.dtype"):
        compiled(exported(tmp_path, "float32"), "", inputs="", model="dtype: float16")
