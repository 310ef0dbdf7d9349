from __future__ import annotations

import torch
from models import branch_nets
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.reparameterize import Dbb

CHAIN = ("conv", [("reparameterize.expand", {"form": "dbb"}), ("reparameterize.dbb", {})])


def run(model: nn.Module, *shape: int) -> tuple[gw.Program, gw.Result]:
    x = torch.randn(*shape, dtype=torch.float64)
    dims = {"input": {0: "batch", 2: "h", 3: "w"}}
    program = gw.trace(branch_nets.with_statistics(model), (x,), dims)
    result = Dbb().execute(program, Context())
    assert measure(program, result.program).relative < 1e-10  # float64: rounding alone
    return program, result


def calls(program: gw.Program) -> list[str]:
    names = [op_name(n) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "sym_size"]


def test_the_papers_own_block() -> None:
    """With its norm that pads with its image of zero, as the paper's code writes into slices."""
    program, result = run(nn.Sequential(branch_nets.dbb(4, 6)), 2, 4, 7, 8)
    assert len(calls(program)) > 60
    assert calls(result.program) == ["conv2d", "relu"]
    (action,) = result.actions
    assert action.what == "one layer of 4 branches: kernel, pointwise, sequence, sequence"


def test_a_border_in_float32_with_its_norm_folded() -> None:
    """The border's constant and the folded bias were rounded apart from each other."""
    x = torch.randn(2, 4, 7, 8)
    model = branch_nets.with_statistics(nn.Sequential(branch_nets.dbb(4, 6))).float()
    program = gw.passes.cleanup.FoldBatchNorm()(gw.trace(model, (x,)))
    folded = Dbb()(program)
    assert calls(folded) == ["conv2d", "relu"]
    assert gw.compare(program(x), folded(x)).relative < 1e-6  # float32: rounding alone


def test_joined_channels() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 5, 1, bias=False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.relu(torch.cat([self.a(input), self.b(input)], 1))

    program, result = run(Joined(), 2, 4, 7, 8)
    assert calls(program) == ["conv2d", "conv2d", "cat", "relu"]
    assert "multiplications" in result.actions[0].reason
    wide = Dbb(max_macs=3).execute(program, Context()).program
    assert calls(wide) == ["conv2d", "relu"]
    assert measure(program, wide).relative < 1e-10  # float64: rounding alone
