from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.passes.base import Result

SMALL = {"generations": 12, "offspring": 12, "survivors": [3, 1], "tokens": [16, 64]}
CHAIN = (
    "text",
    [("search.bits", {"quantizer": "quantize.rtn", "options": {"block": 16}, "measure": "mse",
                      "targets": ["kind:linear"], "target": 4.0, **SMALL})],
)  # fmt: skip
RTN = {"quantizer": "quantize.rtn", "options": {"block": -1}, **SMALL}


class Net(nn.Module):
    """Four layers of one size that matter from much to hardly, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for factor, layer in zip((1.0, 0.5, 0.01, 0.001), self.layers, strict=True):
            h = h + factor * torch.relu(layer(x))
        return self.last(h)


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
    step = gw.passes.search.Bits(targets=["layers.*"], target=4, **RTN)
    return step.run(program(), Context(calibration=list(data()), seed=3))


def distance(found: gw.Program) -> float:
    """Mean KL(program || found) over all rows, by its definition in float64."""
    x = torch.cat([batch[0] for batch in data()])
    with torch.no_grad():
        p, q = (torch.softmax(made(x).double(), -1) for made in (program(), found))
    return float((p * (p / q).log()).sum(-1).mean())


def bits_of(result: Result) -> dict[str, int]:
    return {a.layer: int(a.what.split()[0]) for a in result.actions if a.what.endswith(" bits")}


def test_layers_that_matter_get_more_bits_and_the_average_stays() -> None:
    found = bits_of(searched())
    assert list(found) == [f"layers.{i}" for i in range(4)]
    assert sum(found.values()) == 4 * 4
    assert found["layers.0"] > found["layers.2"]
    assert found["layers.0"] > found["layers.3"]
    uniform = gw.passes.quantize.Rtn(bits=4, block=-1, targets=["layers.*"])(program())
    metrics = searched().metrics
    assert metrics["bits"] == 4
    assert metrics["distance_at_start"] == pytest.approx(distance(uniform), rel=1e-3)
    assert metrics["distance"] == pytest.approx(distance(searched().program), rel=1e-3)
    assert metrics["distance"] < 0.5 * metrics["distance_at_start"]


def test_every_layer_is_what_the_quantizer_makes_of_it_at_its_width() -> None:
    for name, bits in bits_of(searched()).items():
        alone = gw.passes.quantize.Rtn(bits=bits, block=-1, targets=[name])(program())
        wanted, found = (
            weight_value(p, next(x for x in layers(p) if x.name == name))
            for p in (alone, searched().program)
        )
        assert torch.equal(wanted, found)


def test_a_seed_gives_one_result() -> None:
    step = gw.passes.search.Bits(targets=["layers.*"], target=4, **RTN)
    again = step.run(program(), Context(calibration=list(data()), seed=3))
    assert again.actions == searched().actions
    assert again.metrics == searched().metrics


def test_a_target_between_widths_is_met_from_below() -> None:
    step = gw.passes.search.Bits(target=3.3, exchange="any", bits=[2, 4, 8], **RTN)
    result = step.run(program(), Context(calibration=list(data())))
    found = bits_of(result)
    sizes = {f"layers.{i}": 256 for i in range(4)} | {"last": 160}
    mean = sum(sizes[name] * bits for name, bits in found.items()) / sum(sizes.values())
    assert mean <= 3.3
    assert mean > 3.0
    assert result.metrics["bits"] == pytest.approx(mean)


def test_a_tied_table_stays_what_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(self.table(ids))))

    torch.manual_seed(0)
    before = gw.trace(Tied().eval(), {"ids": torch.randint(20, (4, 5))}, {"ids": {0: "batch"}})
    batches = [(torch.randint(20, (4, 5)),) for _ in range(3)]
    step = gw.passes.search.Bits(targets=["kind:linear"], target=3, exchange="any", **RTN)
    result = step.run(before, Context(calibration=batches))
    assert result.metrics["distance"] > 0  # what trials and the result agree on
    assert torch.equal(result.program.state["table.weight"], before.state["table.weight"])


def test_a_quantizer_that_does_more_is_refused() -> None:
    given = {"quantizer": "quantize.adaquant", "options": {"activation_bits": 3, "iterations": 1}}
    step = gw.passes.search.Bits(target=3, **{**RTN, **given})
    with pytest.raises(ModelError, match="where trials promised"):
        step.run(program(), Context(calibration=list(data())))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": 9}, "lies outside the widths"),
        ({"bits": [2, 4, 8]}, "exchange: any"),
        ({"bits": [4, 2]}, "ascend"),
        ({"survivors": [2, 1]}, "one value per stage"),
        ({"survivors": [2, 4, 1]}, "fall from stage to stage"),
        ({"quantizer": "prune.magnitude"}, "has no options `bits`"),
        ({"quantizer": "quantize.nothing"}, "quantize.nothing"),
        ({"options": {"blocks": 3}}, "blocks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        gw.passes.search.Bits(**options)
