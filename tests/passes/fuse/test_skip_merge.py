from __future__ import annotations

import pytest
import torch
from models.branch_nets import CONVOLUTIONS
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.fuse import SkipMerge

CHAIN = ("residual", [("fuse.skip_merge", {})])


class Block(nn.Module):
    """A stem that ends in a ReLU, and a residual block behind it."""

    def __init__(self, body: nn.Module, skip: nn.Module | None = None, ends: str = "relu") -> None:
        super().__init__()
        rank = next(m.weight.dim() for m in body.modules() if hasattr(m, "weight")) - 2
        self.stem, self.body = CONVOLUTIONS[rank](3, 4, 3, padding=1), body
        self.skip, self.ends = nn.Identity() if skip is None else skip, ends

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = getattr(torch, self.ends)(self.stem(x))
        return torch.relu(self.body(x) + self.skip(x))


def body(rank: int, out: int = 4, stride: int = 1, inner: int = 6, bias: bool = True) -> nn.Module:
    conv = CONVOLUTIONS[rank]
    return nn.Sequential(
        conv(4, inner, 3, stride, 2, 2, bias=bias), nn.ReLU(),
        conv(inner, 5, 1, bias=bias), nn.ReLU(), conv(5, out, 3, padding=1, bias=bias),
    )  # fmt: skip


def merged(net: nn.Module, rank: int = 2) -> tuple[gw.Program, gw.passes.base.Result]:
    x = torch.randn(2, 3, *(7, 8, 6)[:rank], dtype=torch.float64)
    program = gw.trace(net.double().eval(), (x,), {"x": {0: "batch"}})
    return program, SkipMerge().execute(program, Context())


@pytest.mark.parametrize(
    ("rank", "net"),
    [
        (1, Block(body(1))),
        (2, Block(body(2, bias=False))),
        (3, Block(body(3))),
        (2, Block(body(2, 8, 2), nn.Conv2d(4, 8, 1, 2))),
        (2, Block(body(2, 8, 2, bias=False), nn.Conv2d(4, 8, 1, 2))),
    ],
)
def test_the_block_is_a_plain_chain_that_computes_the_same(rank: int, net: nn.Module) -> None:
    program, result = merged(net, rank)
    assert measure(program, result.program).relative < 1e-12  # float64: rounding alone
    calls = [op_name(n) for n in result.program.graph.nodes if n.op == "call_function"]
    assert [name for name in calls if name != "sym_size"] == [f"conv{rank}d", "relu"] * 4
    assert result.metrics["skips_merged"] == 1


def test_layers_carry_one_channel_for_each_of_the_skip() -> None:
    _, result = merged(Block(body(2)))
    shapes = {n: tuple(t.shape) for n, t in result.program.state.items() if n.endswith("weight")}
    assert shapes["body.0.weight"] == (6 + 4, 4, 3, 3)
    assert shapes["body.2.weight"] == (5 + 4, 6 + 4, 1, 1)
    assert shapes["body.4.weight"] == (4, 5 + 4, 3, 3)


class Shared(Block):
    """The middle layer's result has another reader."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        inner = self.body[1](self.body[0](x))
        return self.body[4](self.body[3](self.body[2](inner))) + x + inner[:, :4]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Block(body(2), ends="tanh"), "may be negative"),
        (Block(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))), "fuse.skip folds it"),
        (Block(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1))), "gelu is in"),
        (
            Block(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))),
            "batch_norm is in its way",
        ),
        (
            Block(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(),
                                nn.Conv2d(4, 4, 1))),
            "body.0 has groups",
        ),
        (Block(body(2, 8, 2), nn.Conv2d(4, 8, 3, 2, 1)), "no skip"),
        (Block(body(2, 8, 2), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 1, 2))), None),
        (Shared(body(2)), "other readers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_stays_with_the_reason(net: nn.Module, reason: str | None) -> None:
    program, result = merged(net)
    assert result.program.graph is program.graph
    assert not any(action.changed for action in result.actions)
    if reason is not None:
        assert any(reason in action.reason for action in result.actions), result.actions
