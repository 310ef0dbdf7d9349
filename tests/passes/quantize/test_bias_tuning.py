"""quantize.bias_tuning: only biases move, towards the original's outputs, and codes stay codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError

TRAINING = {"steps": 2, "lr": 0.01}
CHAIN = (
    "conv",
    [
        ("cleanup.fold_batch_norm", {}),
        ("quantize.rtn", {"block": 16}),
        ("quantize.bias_tuning", {"tune": TRAINING}),
    ],
)

quantize = gw.passes.quantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program(x: Tensor) -> gw.Program:
    torch.manual_seed(0)
    net = Net().eval()
    net.head.weight.data *= 8  # logits that differ
    return gw.trace(net, {"x": x[:2]}, {"x": {0: "n"}})


def divergence(made: gw.Program, original: gw.Program, x: Tensor) -> float:
    with torch.no_grad():
        log, target = made(x).log_softmax(-1), original(x).softmax(-1)
        return float(kl_div(log, target, reduction="batchmean"))


def context(program: gw.Program, x: Tensor, **more: Any) -> Context:
    return Context(training=[{"x": x[:24]}, {"x": x[24:]}], teacher=program, calibration=[(x,)],
                   **more)  # fmt: skip


@pytest.mark.parametrize("name", ["rtn", "int8"])
def test_biases_alone_move_and_follow_the_original(
    name: str, program: gw.Program, x: Tensor
) -> None:
    method = (quantize.Rtn(bits=3, block=16) if name == "rtn"
              else quantize.Int8(activations="static", any_cpu=False))  # fmt: skip
    rough = method.execute(program, context(program, x)).program
    if name == "int8":  # int8 is near already: start from a bias that is off
        state = dict(rough.state)
        (codes,) = [
            n for n in state if n.startswith("first.bias") and state[n].dtype == torch.int32
        ]
        state[codes] = (state[codes] * 0.8).to(torch.int32)
        rough = rough.replace(state=state)
    given = quantize.BiasTuning(tune={"steps": 60, "lr": 0.05})
    result = given.execute(rough, context(program, x))
    moved = {n for n, t in result.program.state.items() if not torch.equal(t, rough.state[n])}
    assert moved
    assert all("bias" in n for n in moved)
    assert {n: t.dtype for n, t in result.program.state.items()} == {
        n: t.dtype for n, t in rough.state.items()
    }
    before, after = (divergence(p, program, x) for p in (rough, result.program))
    assert after < 0.9 * before
    said = {a.layer: a for a in result.actions}
    assert said["second"].reason == ("it has no bias" if not said["second"].changed else "")
    assert said["head"].changed


def test_the_recipe_is_that_of_the_papers_code() -> None:
    tune = quantize.BiasTuning().options.tune
    assert (tune.optimizer, tune.lr, tune.momentum, tune.steps) == ("sgd", 0.1, 0.0, 800)
    assert (tune.loss, tune.schedule) == ("kl", "constant")
    assert quantize.BiasTuning(tune={"epochs": 3}).options.tune.steps is None


def test_a_network_that_is_not_quantized_is_refused(program: gw.Program, x: Tensor) -> None:
    with pytest.raises(ModelError, match="can train the bias of none") as caught:
        quantize.BiasTuning(tune=TRAINING).execute(program, context(program, x))
    assert "first: its weight is not quantized" in caught.value.details
