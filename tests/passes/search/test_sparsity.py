from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.passes.base import Result

SMALL = {"generations": 15, "offspring": 12, "survivors": [3, 1], "tokens": [16, 64]}
CHAIN = (
    "text",
    [("search.sparsity", {"pruner": "prune.magnitude", "targets": ["kind:linear"], "steps": 2,
                          "measure": "mse", **SMALL})],
)  # fmt: skip
MAGNITUDE = {"pruner": "prune.magnitude", **SMALL}


class Net(nn.Module):
    """Layers of two sizes, of which one of each hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(32, 10) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.wide[0](x)) + 0.01 * torch.relu(self.wide[1](x))
        return self.narrow[0](h) + 0.01 * self.narrow[1](h)


@cache
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), {"x": torch.randn(8, 16)}, dynamic={"x": {0: "batch"}})


@cache
def data() -> tuple[tuple[Tensor], ...]:
    torch.manual_seed(1)
    return tuple((torch.randn(16, 16),) for _ in range(6))


@cache
def searched() -> Result:
    step = gw.passes.search.Sparsity(target=0.6, steps=6, **MAGNITUDE)
    return step.run(program(), Context(calibration=list(data()), seed=1))


WEIGHTS = ("wide.0", "wide.1", "narrow.0", "narrow.1")


def zeros(found: gw.Program) -> dict[str, int]:
    return {name: int((found.state[f"{name}.weight"] == 0).sum()) for name in WEIGHTS}


def test_zeros_go_where_they_hurt_least_and_are_as_many() -> None:
    found = zeros(searched().program)
    step = 320 // 16
    sizes = {"wide.0": 512, "wide.1": 512, "narrow.0": 320, "narrow.1": 320}
    uniform = {name: size - round(0.4 * size) for name, size in sizes.items()}
    assert sum(found.values()) == pytest.approx(sum(uniform.values()), abs=4)
    for name in WEIGHTS:  # every layer is whole steps from its share
        steps = (found[name] - uniform[name]) / step
        assert steps == pytest.approx(round(steps), abs=1 / step)
    assert found["wide.1"] > uniform["wide.1"]
    assert found["narrow.1"] > uniform["narrow.1"]
    assert found["wide.0"] + found["narrow.0"] < uniform["wide.0"] + uniform["narrow.0"]
    assert searched().metrics["distance"] < 0.7 * searched().metrics["distance_at_start"]


def test_the_distance_is_that_of_the_result() -> None:
    x = torch.cat([batch[0] for batch in data()])
    with torch.no_grad():
        p, q = (torch.softmax(made(x).double(), -1) for made in (program(), searched().program))
    wanted = float((p * (p / q).log()).sum(-1).mean())
    assert searched().metrics["distance"] == pytest.approx(wanted, rel=1e-3)


def test_every_layer_is_what_the_pruner_makes_of_it() -> None:
    for name, count in zeros(searched().program).items():
        weight = program().state[f"{name}.weight"].abs().flatten()
        kept = searched().program.state[f"{name}.weight"].flatten()
        largest = weight.argsort(descending=True)[: weight.numel() - count]
        assert set(kept.nonzero().flatten().tolist()) == set(largest.tolist())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pruner": "quantize.rtn"}, "has no options `sparsity`"),
        ({"options": {"sparse": 1}}, "sparse"),
        ({"target": 1.0}, "target"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        gw.passes.search.Sparsity(**options)
