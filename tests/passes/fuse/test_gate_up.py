from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.fuse import GateUp

CHAIN = ("gated", [("fuse.gate_up", {})])


class Gated(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.activation = {"silu": F.silu, "gelu": F.gelu, "none": lambda x: x}[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("activation", ["silu", "gelu", "none"])
def test_two_projections_are_one(activation: str) -> None:
    x = torch.randn(2, 3, 6).double()
    given = gw.trace(Gated(activation).double().eval(), (x,), {"x": {0: "b", 1: "n"}})
    result = GateUp().execute(given, Context())
    assert measure(given, result.program).relative < 1e-12  # float64: rounding alone
    assert sum(op_name(node) == "linear" for node in result.program.graph.nodes) == 2
    assert result.program.state["gate_up.weight"].shape == (20, 6)
    assert result.actions == (gw.Action("gate_up", "one layer of gate, up"),)


def test_projections_of_two_activations_stay() -> None:
    class Mixed(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x + 1))

    given = gw.trace(Mixed("silu").eval(), (torch.randn(2, 3, 6),))
    result = GateUp().execute(given, Context())
    assert result.program.graph is given.graph
    assert result.actions[0].reason == "no product of two projections of one activation"
