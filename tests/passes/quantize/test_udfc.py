"""quantize.udfc: codes on their grid, repaired readers, and the reasons for what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.stored.grid import grid_codes
from graphwright.passes.quantize import Udfc

CHAIN = ("conv", [("quantize.udfc", {})])


class Net(nn.Module):
    """Two convolutions with batch norm, a depthwise one, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.b, self.c = nn.Conv2d(12, 10, 3), nn.Conv2d(10, 10, 3, groups=10)
        self.fc1, self.fc2 = nn.Linear(10 * 16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.relu(self.c(torch.relu(self.b(x))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    model = Net()
    model.norm.momentum = None
    with torch.no_grad():
        model(torch.randn(64, 3, 10, 10))
    return gw.trace(model.eval(), (torch.randn(4, 3, 10, 10),), dynamic={"x": {0: "batch"}})


def ran(program: gw.Program, **options: Any) -> Any:
    return Udfc(**options).execute(program, Context())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_round_to_nearest(bits: int, search: bool) -> None:
    rows = torch.randn(7, 20)
    rows[3] = 0.0
    codes, scale = grid_codes(rows, bits, search)
    largest = 2 ** (bits - 1) - 1
    for row, got, step in zip(rows, codes, scale, strict=True):
        wanted = [max(-largest, min(largest, round(float(v) / float(step)))) for v in row]
        assert got.tolist() == wanted
    if not search:
        torch.testing.assert_close(scale[:3], rows[:3].abs().amax(1) / largest)
    plain = grid_codes(rows, bits)
    errors = [(c.float() * s[:, None] - rows).square().sum(1) for c, s in ((codes, scale), plain)]
    assert bool((errors[0] <= errors[1]).all())


def test_every_layer_becomes_codes_and_runs(program: gw.Program) -> None:
    result = ran(program, bits=4)
    state = result.program.state
    for name in ("a", "b", "c", "fc1", "fc2"):
        codes = state[f"{name}.weight_codes"]
        assert codes.dtype == torch.int8
        assert int(codes.abs().max()) == 7
        assert f"{name}.weight" not in state
    x = torch.randn(3, 3, 10, 10)
    with torch.no_grad():
        gap = (result.program(x) - program(x)).norm() / program(x).norm()
    assert 0 < float(gap) < 0.5
    what = {a.layer: (a.what, a.reason) for a in result.actions}
    assert what["a"][0].startswith("4 bit, repair ")
    assert what["b"][0].startswith("4 bit, repair diagonal")  # its reader is depthwise
    assert "output" in what["fc2"][1]


def test_codes_stand_for_the_repaired_weight_of_a_reader(program: gw.Program) -> None:
    """Without the repair behind `a`, `b` has other codes; `a` is the same."""
    repaired, plain = ran(program, bits=4), ran(program, bits=4, repair="none")
    first, second = repaired.program.state, plain.program.state
    assert torch.equal(first["a.weight_codes"], second["a.weight_codes"])
    weight = program.state["b.weight"].detach().flatten(1)
    codes, scale = grid_codes(weight, 4)
    assert torch.equal(second["b.weight_codes"].flatten(1), codes)
    assert torch.equal(second["b.weight_scale"], scale)
    assert not torch.equal(first["b.weight_codes"].flatten(1), codes)


def test_repair_lowers_the_error_of_low_bits() -> None:
    better = 0
    for seed in range(4):
        torch.manual_seed(seed)
        low = torch.randn(16, 4) @ torch.randn(4, 12)
        model = nn.Sequential(nn.Linear(12, 16), nn.Identity(), nn.Linear(16, 6))
        with torch.no_grad():
            model[0].weight.copy_(low + 0.05 * torch.randn(16, 12))
        program = gw.trace(model.eval(), (torch.randn(4, 12),), {"input": {0: "batch"}})
        x = torch.randn(256, 12)
        errors = []
        for repair in ("ridge", "none"):
            result = ran(program, bits=3, repair=repair, targets=["0"])
            errors.append(float((result.program(x) - program(x)).detach().norm()))
        better += errors[0] < errors[1]
    assert better == 4


def test_what_cannot_be_rounded_says_so(program: gw.Program) -> None:
    once = ran(program, bits=6, targets=["fc*"]).program
    result = ran(once, bits=6)
    reasons = {a.layer: a.reason for a in result.actions}
    assert "computed in the graph" in reasons["fc1"]
    assert "a.weight_codes" in result.program.state
    assert torch.equal(result.program.state["fc1.weight_codes"], once.state["fc1.weight_codes"])
    with pytest.raises(ModelError, match="none of its targets"):
        ran(once, bits=6, targets=["fc1*"])
    broken = {**program.state, "b.weight": nn.Parameter(torch.full((10, 12, 3, 3), torch.inf))}
    with pytest.raises(ModelError, match="NaN or infinity"):
        ran(program.replace(state=broken))


def test_the_artifact_of_onnx_runtime_gives_the_same(program: gw.Program, tmp_path: Any) -> None:
    result = ran(program, bits=6).program
    compiled = gw.lower(result, "onnxruntime")
    x = torch.randn(3, 3, 10, 10)
    torch.testing.assert_close(compiled(x), result(x), rtol=1e-4, atol=1e-5)
