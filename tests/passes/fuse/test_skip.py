from __future__ import annotations

import pytest
import torch
from models.branch_nets import with_statistics
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.fuse import Skip

CHAIN = ("unet", [("reparameterize.expand", {}), ("fuse.skip", {})])


class Residual(nn.Module):
    """x (or a 1x1 convolution of it) + body(x)."""

    def __init__(self, body: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.skip = body, nn.Identity() if skip is None else skip

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.skip(input) + self.body(input))


def calls(program: gw.Program) -> list[str]:
    names = [op_name(n) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "sym_size"]


@pytest.mark.parametrize(
    ("net", "shape", "left"),
    [
        (Residual(nn.Linear(6, 6)), (2, 5, 6), "linear"),
        (Residual(nn.Conv1d(4, 4, 3, padding=1)), (2, 4, 9), "conv1d"),
        (Residual(nn.Conv3d(4, 4, 3, padding=1, groups=2)), (2, 4, 5, 5, 5), "conv3d"),
        (Residual(nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1, 2)), (2, 4, 7, 8), "conv2d"),
        (
            Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))),
            (2, 4, 7, 8), "conv2d",
        ),
    ],
)  # fmt: skip
def test_a_linear_body_takes_its_skip_in(net: nn.Module, shape: tuple[int, ...], left: str) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    program = gw.trace(with_statistics(net), (x,), {"input": {0: "batch"}})
    result = Skip().execute(program, Context())
    assert measure(program, result.program).relative < 1e-12  # float64: rounding alone
    assert calls(result.program) == [left, "relu"]
    assert result.metrics["skips_left"] == 0


def basic(c: int = 4) -> nn.Module:
    return Residual(
        nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
    )


def test_other_skips_stay_with_the_reason() -> None:
    program = gw.trace(basic().eval(), (torch.randn(2, 4, 8, 8),))
    result = Skip().execute(program, Context())
    assert result.program.graph is program.graph
    assert result.actions == (
        gw.Action.left("skip past body.2", "what it goes past is not linear", "kept"),
    )
