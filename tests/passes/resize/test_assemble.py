"""resize.assemble: units that go leave their input, mixtures of kernels, distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import digits
from models.tune_net import images, table
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.trunk.units import chosen_units, find_units, without
from graphwright.passes.resize import Assemble
from graphwright.passes.resize._units.conditional import add_experts

CHAIN = (
    "trunk",
    [
        (
            "resize.assemble",
            {"drop": ["blocks.1"], "tune": {"epochs": 1, "lr": 0.001, "loss": "teacher_mse"}},
        )
    ],
)


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


class Net(nn.Module):
    """Two levels, two units in each, and a projection between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.high = nn.ModuleList(Unit(4) for _ in range(2))
        self.down = nn.Conv2d(4, 8, 2, stride=2)
        self.low = nn.ModuleList(Unit(8) for _ in range(2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.high:
            x = unit(x)
        x = self.down(torch.relu(x))
        for unit in self.low:
            x = unit(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def traced(net: Net, batch: int | None = None) -> gw.Program:
    x = images()[0][: batch or 4]
    return gw.trace(net, (x,), None if batch else {"x": {0: "batch"}})


def test_units_are_found_and_leave_their_input(net: Net) -> None:
    program = traced(net)
    units = find_units(program)
    assert [unit.name for unit in units] == ["high.0", "high.1", "low.0", "low.1"]
    assert units[0].parameters == 2 * 4 * 4 * 9 + 2 * 4
    assert units[0].macs == 4 * 2 * 4 * 4 * 9 * 16  # batch 4, 4x4 places
    light = without(program, chosen_units(units, ["high.1", "low.0"]), "test")
    x = images()[0][:5]
    h = net.high[0](net.stem(x))
    expected = net.fc(net.low[1](net.down(torch.relu(h))).mean((2, 3)))
    torch.testing.assert_close(light(x), expected)
    assert not any(name.startswith(("high.1", "low.0")) for name in light.state)


def test_neighbours_go_together(net: Net) -> None:
    program = traced(net)
    light = without(program, find_units(program), "test")
    x = images()[0][:5]
    expected = net.fc(net.down(torch.relu(net.stem(x))).mean((2, 3)))
    torch.testing.assert_close(light(x), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [None, 1])
def test_a_mixture_is_the_formula(batch: int | None, groups: int) -> None:
    """Against a loop over samples that mixes kernels first; equal experts are the convolution."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    net = nn.Sequential(conv)
    x = torch.randn(batch or 5, 4, 7, 7, dtype=torch.float64)
    program = gw.trace(net, (x,), None if batch else {"input": {0: "batch"}})
    mixed, _ = add_experts(program, ["0"], 3, torch.Generator().manual_seed(0), "test")
    torch.testing.assert_close(mixed(x), program(x), rtol=0.05, atol=0.05)
    state = dict(mixed.state)
    state["0.router.weight"] = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    state["0.router.bias"] = nn.Parameter(torch.randn(3, dtype=torch.float64))
    mixed = mixed.replace(state=state)
    bank = state["0.expert_weight"].view(3, 6, 4 // groups, 3, 3)
    rows = []
    for row in x:
        pooled = row.mean((1, 2))
        shares = (state["0.router.weight"] @ pooled + state["0.router.bias"]).softmax(0)
        kernel = torch.einsum("e,eoihw->oihw", shares, bank)
        rows.append(F.conv2d(row[None], kernel, conv.bias, 2, 1, 1, groups))
    torch.testing.assert_close(mixed(x), torch.cat(rows), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [None, 1])
def test_mixtures_in_both_artifacts(net: Net, batch: int | None) -> None:
    program, _ = add_experts(
        traced(net, batch), ["high.0.one", "low.1.*"], 2, torch.Generator().manual_seed(0), "test"
    )
    x = images()[0][: batch or 3]
    for backend in ("onnxruntime", "triton"):
        got = torch.as_tensor(gw.lower(program, backend)(x))
        torch.testing.assert_close(got, program(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_loss_has_its_three_terms(net: Net) -> None:
    """The first loss, by the models themselves."""
    program = traced(net)
    x, labels = images()
    data = table(program.signature, x, labels, 48)
    options = {"drop": ["high.1"], "feature": 0.5, "output": 2.0,
               "tune": {"steps": 1, "loss": "cross_entropy", "shuffle": False}}  # fmt: skip
    result = Assemble(**options).execute(program, Context(training=data, teacher=program))
    with torch.no_grad():
        big = [net.stem(x)]
        big.append(net.high[0](big[-1]))
        big.append(net.high[1](big[-1]))
        low0 = net.low[0](net.down(torch.relu(big[2])))
        low1 = net.low[1](low0)
        light0 = net.low[0](net.down(torch.relu(big[1])))
        light1 = net.low[1](light0)
        out = net.fc(light1.mean((2, 3)))
        expected = (
            F.cross_entropy(out, labels)
            + 2.0 * F.mse_loss(out, net.fc(low1.mean((2, 3))))
            + 0.5 * (F.mse_loss(light0, low0) + F.mse_loss(light1, low1))
        )
    assert result.metrics["first_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_macs_take_high_resolution_first(net: Net) -> None:
    program = traced(net)
    x, labels = images()
    data = table(program.signature, x, labels, 16)
    tune = {"steps": 1, "loss": "teacher_mse"}
    run = Context(training=data, teacher=program)
    result = Assemble(macs=0.2, tune=tune).execute(program, run)
    gone = [a.layer for a in result.actions if a.changed]
    assert gone[0].startswith("high.")
    with pytest.raises(ModelError, match="fewer than 99"):
        Assemble(macs=0.99, tune=tune).execute(program, run)


def test_distilled_digits_net_follows_the_big_one() -> None:
    """A unit of a trained net goes; distillation without labels brings its accuracy back."""
    program = digits.traced(digits.trained("resnet"))
    units = find_units(program)
    light = without(program, chosen_units(units, ["3.*", "6.*", "8.*"]), "test")
    tune = {"epochs": 3, "lr": 1e-3, "loss": "teacher_mse"}
    small = Assemble(drop=["3.*", "6.*", "8.*"], tune=tune)(
        program, training=digits.training(program), teacher=program
    )
    assert digits.accuracy(light) < 0.9
    assert digits.accuracy(small) > 0.95


def test_refusals(net: Net) -> None:
    program = traced(net)
    x, labels = images()
    data = table(program.signature, x, labels, 16)
    with pytest.raises(ModelError, match=r"matches no residual unit.*") as caught:
        Assemble(drop=["down"])(program, training=data)
    assert "high.0" in str(caught.value.fix)
    with pytest.raises(ArgumentError, match="one of drop and macs"):
        Assemble()
    with pytest.raises(ArgumentError, match="belong together"):
        Assemble(drop=["high.0"], experts=2)
