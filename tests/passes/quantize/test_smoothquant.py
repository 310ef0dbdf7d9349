from __future__ import annotations

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context

CHAIN = ("text", [("quantize.smoothquant", {})])

Int8, Smoothquant = gw.passes.quantize.Int8, gw.passes.quantize.Smoothquant


class Outliers(nn.Module):
    """A pre-norm block whose norm blows up a few channels, as trained transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.norm.weight.data[[3, 17, 40]] = 40.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def prepared() -> tuple[gw.Program, list[tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    program = gw.trace(Outliers().eval(), (torch.randn(4, 10, 64),), {"x": {0: "n", 1: "s"}})
    return program, [(torch.randn(4, 12, 64),) for _ in range(4)]


def test_the_function_stays_and_int8_gains() -> None:
    program, batches = prepared()
    smooth = Smoothquant()(program, calibration=batches)
    assert measure(program, smooth, batches).relative < 1e-5
    plain = measure(program, Int8()(program), batches).relative
    gained = measure(program, Int8()(smooth), batches).relative
    assert gained < 0.6 * plain


def test_factors_go_into_the_norm_at_no_cost() -> None:
    program, batches = prepared()
    step = Smoothquant(alpha=0.5, targets=["up"])
    result = step.execute(program, Context(calibration=batches))
    calls = [n.target for n in result.program.graph.nodes if n.op == "call_function"]
    before = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls == before
    assert not torch.equal(result.program.state["norm.weight"], program.state["norm.weight"])


def test_without_inserted_scales_a_shared_activation_is_left_alone() -> None:
    class PostNorm(Outliers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return h + self.down(torch.tanh(self.up(h)))

    torch.manual_seed(0)
    program = gw.trace(PostNorm().eval(), (torch.randn(4, 10, 64),), {"x": {0: "n", 1: "s"}})
    batches = [(torch.randn(4, 12, 64),) for _ in range(3)]
    left = Smoothquant(insert_scales=False).execute(program, Context(calibration=batches))
    assert left.program.graph is program.graph
    assert {a.what for a in left.actions} == {"left alone"}
    scaled = Smoothquant()(program, calibration=batches)
    assert measure(program, scaled, batches).relative < 1e-5
