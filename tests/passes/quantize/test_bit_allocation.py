from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.ir.stored.transplant import transplant
from graphwright.passes.quantize._math.allocate import allocate

CHAIN = ("text", [("quantize.bit_allocation", {"quantizer": "quantize.rtn"})])


def test_the_allocation_is_the_best_of_all() -> None:
    for seed in range(6):
        generator = np.random.default_rng(seed)
        loss = generator.exponential(size=(6, 3)) * [0, 1, 4]
        cost = generator.integers(1, 50, size=(6, 1)) * np.array([[8.0, 4.0, 2.0]])
        budget = float(generator.uniform(cost.min(1).sum(), cost.max(1).sum()))
        rows = np.arange(6)
        best = min(
            loss[rows, picks].sum()
            for picks in itertools.product(range(3), repeat=6)
            if cost[rows, picks].sum() <= budget
        )
        found = allocate(loss, cost, budget)
        assert cost[rows, found].sum() <= budget
        assert loss[rows, found].sum() == pytest.approx(best, rel=1e-9)


def test_budgets_at_the_ends_leave_no_choice() -> None:
    sizes = np.array([[100.0], [30.0], [7.0]])
    loss, cost = np.array([[0.0, 1.0]] * 3), sizes * [8.0, 4.0]
    whole = 32 * sizes.sum()
    assert allocate(loss, cost, 0.25 * whole).tolist() == [0, 0, 0]
    assert allocate(loss, cost, 0.125 * whole).tolist() == [1, 1, 1]
    with pytest.raises(ArgumentError, match="cannot be met: the cheapest choices cost"):
        allocate(loss, cost, 0.12 * whole)


class Net(nn.Module):
    """Of the two inner layers, one matters and one hardly does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.big, self.small = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.big(h)) + 0.01 * torch.relu(self.small(h)))


def program() -> Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), {"x": torch.randn(8, 16)}, dynamic={"x": {0: "batch"}})


def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(32, 16),) for _ in range(2)]


RTN = {"quantizer": "quantize.rtn", "options": {"block": -1}}


def test_the_layer_that_matters_less_gets_fewer_bits() -> None:
    step = gw.passes.quantize.BitAllocation(
        bits=[8, 2], budget=0.19, targets=["big", "small"], **RTN
    )
    before = program()
    result = step.run(before, Context(calibration=batches()))
    assert {a.layer: a.what for a in result.actions} == {"big": "8 bits", "small": "2 bits"}
    assert result.metrics["cost"] <= result.metrics["budget"]
    # the mix is what rounding each layer at its width gives
    for name, bits in {"big": 8, "small": 2}.items():
        alone = gw.passes.quantize.Rtn(bits=bits, block=-1, targets=[name])(before)
        wanted, found = (
            weight_value(p, next(x for x in layers(p) if x.name == name))
            for p in (alone, result.program)
        )
        assert torch.equal(wanted, found)
    swapped = gw.passes.quantize.Rtn(bits=2, block=-1, targets=["big"])(before)
    swapped = gw.passes.quantize.Rtn(bits=8, block=-1, targets=["small"])(swapped)
    x = batches()[0][0]
    with torch.no_grad():
        errors = [float((p(x) - before(x)).norm()) for p in (result.program, swapped)]
    assert errors[0] < 0.2 * errors[1]


def test_inputs_grids_and_biases_go_with_their_layer() -> None:
    before = program()
    made = {
        bits: gw.passes.quantize.Adaquant(bits=bits, activation_bits=bits, iterations=5)(
            before, calibration=batches()
        )
        for bits in (8, 3)
    }
    editor = Editor(made[8], by="test")
    (node,) = [x.node.name for x in layers(made[8]) if x.name == "big"]
    transplant(editor, made[3], [node])
    mix = editor.finish()

    def parts(p: Program, name: str) -> tuple[Tensor, Tensor, tuple[object, ...]]:
        layer = next(x for x in layers(p) if x.name == name)
        x, _, bias = layer.node.args
        return weight_value(p, layer), p.state[str(bias.target)], x.args[1:]

    for name, source in {"first": 8, "big": 3, "small": 8, "last": 8}.items():
        for wanted, found in zip(parts(made[source], name), parts(mix, name), strict=True):
            if isinstance(wanted, Tensor):
                assert torch.equal(wanted, found)
            else:
                assert wanted == found
    assert {x.name for x in layers(mix)} == {"first", "big", "small", "last"}


def test_bit_operations_and_a_table_of_latencies_bound_it_too(tmp_path: Path) -> None:
    context = Context(calibration=batches(), folder=tmp_path)
    step = gw.passes.quantize.BitAllocation(
        quantizer="quantize.adaquant", options={"iterations": 2}, activations=True,
        measure="bit_ops", budget=(5 / 32) ** 2, bits=[8, 4],
    )  # fmt: skip
    result = step.run(program(), context)
    widths = [int(a.what.split()[0]) for a in result.actions]
    assert set(widths) == {4, 8}
    table = {name: {"8": 2.0, "4": 1.0} for name in ("first", "big", "small", "last")}
    (tmp_path / "ms.json").write_text(json.dumps(table))
    timed = gw.passes.quantize.BitAllocation(measure="latency", table="ms.json", budget=5.0, **RTN)
    result = timed.run(program(), context)
    assert sum(a.what == "8 bits" for a in result.actions) == 1
    assert result.metrics["cost"] == 5.0


def test_tied_layers_get_one_width() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    before = gw.trace(Tied().eval(), {"x": torch.randn(8, 16)})
    step = gw.passes.quantize.BitAllocation(bits=[8, 2], budget=0.16, **RTN)
    result = step.run(before, Context(calibration=[(torch.randn(8, 16),)] * 2))
    told = {a.layer: a.what for a in result.actions}
    assert told["a"] == told["b"]
    calls = [n for n in result.program.graph.nodes if "dequantize_blocks" in str(n.target)]
    assert len(calls) == 2


def test_bad_options_are_refused() -> None:
    data = batches()
    for options, message in (
        ({"quantizer": "prune.zig"}, "has no options `bits` and `targets`"),
        ({"quantizer": "quantize.nothing"}, "no pass named"),
        ({"loss": "cross_entropy", **RTN}, "has no labels"),
        ({"measure": "latency", **RTN}, "no `table` is given"),
        ({"activations": True, **RTN}, "quantizes no inputs"),
        ({"budget": 0.01, **RTN}, "cannot be met"),
    ):
        with pytest.raises(ArgumentError, match=message):
            gw.passes.quantize.BitAllocation(**options)(program(), calibration=data)
