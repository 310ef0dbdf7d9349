"""The fidelity of a run is that of the artifact, passes and lowering together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.onnxruntime.compiled import OnnxCompiled
from graphwright.ir.errors import ModelError
from graphwright.report.build import summary_lines


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


SPEC = """version: 1
passes: [{quantize.rtn: {bits: 8, block: 32}}]
lower: [{onnxruntime: {accuracy_level: 1}}, triton]
"""


def test_it_is_measured_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OnnxCompiled.run_flat
    loses = lambda self, inputs: tuple(0.98 * out for out in run(self, inputs))  # noqa: E731
    monkeypatch.setattr(OnnxCompiled, "run_flat", loses)
    torch.manual_seed(0)
    original = gw.trace(Net().eval(), (torch.randn(16, 64),))
    original.save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    outcome = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    expected = original.run_flat(original.examples)
    errors = {
        name: gw.compare(expected, lowered.run_flat(original.examples)).relative
        for name, lowered in outcome.compiled.items()
    }
    program = gw.compare(expected, outcome.program.run_flat(original.examples)).relative
    assert 0 < program < 0.01
    both = [0.98 * out for out in outcome.program.run_flat(original.examples)]
    assert errors["onnxruntime"] == pytest.approx(gw.compare(expected, both).relative, rel=0.02)
    assert errors["onnxruntime"] > 2 * program
    rows = {row["backend"]: row for row in outcome.report["result"]["artifacts"]}
    for name, error in errors.items():
        assert rows[name]["fidelity"]["relative"] == pytest.approx(error, rel=1e-3)
    assert outcome.report["fidelity"] == rows["onnxruntime"]["fidelity"]
    assert outcome.report["passes"][0]["error"]["relative"] == pytest.approx(program, rel=1e-3)
    shown = [text for what, text in summary_lines(outcome.report) if what == "fidelity"]
    assert [text.rpartition(" ")[2] for text in shown] == ["(onnxruntime)", "(triton)"]


@pytest.mark.parametrize("lower", ["[]", "[onnxruntime]", "[triton]"])
def test_a_model_without_finite_outputs_is_refused(tmp_path: Path, lower: str) -> None:
    net = Net().eval()
    nn.init.constant_(net.b.bias, float("nan"))
    gw.trace(net, (torch.randn(4, 64),)).save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(
        f"version: 1\npasses: [cleanup.canonicalize]\nlower: {lower}\n"
    )
    with pytest.raises(ModelError, match=r"no output of the model has a finite value"):
        gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
