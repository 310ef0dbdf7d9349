from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.cleanup.merge_linear import MergeLinear

CHAIN = ("text", [("cleanup.merge_linear", {})])

aten = torch.ops.aten


def merge(model: nn.Module, *shape: int) -> tuple[gw.Program, gw.Result]:
    torch.manual_seed(0)
    program = gw.trace(model.double().eval(), (torch.randn(*shape, dtype=torch.float64),))
    result = MergeLinear().execute(program, Context())
    assert measure(program, result.program).relative < 1e-12  # float64 rounding
    return program, result


def weights(program: gw.Program) -> int:
    return sum(t.numel() for t in program.state.values())


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("build", "shape", "merged_weight"),
    [
        (lambda a, b: (nn.Linear(6, 9, a), nn.Linear(9, 4, b)), (2, 3, 6), (4, 6)),
        (lambda a, b: (nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=a), nn.Conv2d(8, 4, 1, bias=b)),
         (2, 3, 8, 8), (4, 3, 3, 3)),
        (lambda a, b: (nn.Conv2d(3, 8, 1, bias=a), nn.Conv2d(8, 4, 3, bias=b)),
         (2, 3, 8, 8), (4, 3, 3, 3)),
        (lambda a, b: (nn.Conv1d(3, 8, 1, bias=a), nn.Conv1d(8, 4, 1, bias=b)),
         (2, 3, 8), (4, 3, 1)),
    ],
)  # fmt: skip
def test_two_maps_become_one(build, shape, merged_weight, biases: tuple[bool, bool]) -> None:
    program, result = merge(nn.Sequential(*build(*biases)), *shape)
    shapes = {tuple(t.shape) for n, t in result.program.state.items() if n.endswith("weight")}
    assert shapes == {merged_weight}
    assert weights(result.program) < weights(program)


def test_three_in_a_row_become_one() -> None:
    _, result = merge(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 5)), 2, 6)
    calls = [n for n in result.program.graph.nodes if n.target is aten.linear.default]
    assert len(calls) == 1


def test_a_low_rank_pair_stays_a_pair() -> None:
    program, result = merge(nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 32)), 2, 32)
    assert result.program.graph is program.graph
    assert result.actions[0].reason == "128 weights would become 1,024"


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h) + h


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (ReadTwice(), (2, 4), "also read by other nodes"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)), (2, 3, 8, 8), "pads"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), (2, 3, 8, 8), "neither"),
        (nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 1)), (2, 4, 8, 8), "groups"),
    ],
)
def test_a_pair_that_is_not_one_map_stays(model: nn.Module, shape, reason: str) -> None:
    program, result = merge(model, *shape)
    assert result.program.graph is program.graph
    assert reason in result.actions[0].reason


def test_a_1x1_without_bias_merges_into_a_padding_convolution() -> None:
    _, result = merge(
        nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1)), 2, 3, 8, 8
    )
    assert result.actions[-1].what.startswith("merged")


def test_a_nonlinearity_between_them_keeps_both() -> None:
    program, result = merge(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 2, 4)
    assert result.program.graph is program.graph
    assert result.actions == ()


def test_a_weight_used_by_both_stays() -> None:
    layer = nn.Linear(4, 4)
    program, result = merge(nn.Sequential(layer, layer), 2, 4)
    assert result.program.graph is program.graph
    assert "shares" in result.actions[0].reason
