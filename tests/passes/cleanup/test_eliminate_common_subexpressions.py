from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.cleanup.eliminate_common_subexpressions import (
    EliminateCommonSubexpressions,
)

CHAIN = ("text", [("cleanup.eliminate_common_subexpressions", {})])


class Repeats(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x + 1) * torch.sin(x + 1) + torch.sin(x + 1.0)


def run(model: nn.Module, *inputs: torch.Tensor) -> tuple[gw.Program, gw.Program]:
    program = gw.trace(model, inputs)
    return program, EliminateCommonSubexpressions().execute(program, Context()).program


def count(program: gw.Program, name: str) -> int:
    return sum(name in str(n.target) for n in program.graph.nodes if n.op == "call_function")


def test_equal_calls_are_made_once_and_1_is_not_1_0() -> None:
    program, after = run(Repeats(), torch.randn(4))
    assert (count(program, "sin"), count(after, "sin")) == (3, 2)
    x = torch.randn(4)
    assert torch.equal(program(x), after(x))


class TwoMasks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(8) - torch.rand(8) + x


def test_two_random_draws_stay_two() -> None:
    with pytest.warns(UserWarning, match="other results on every call"):
        _, after = run(TwoMasks(), torch.zeros(8))
    assert count(after, "rand") == 2


class WritesOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.zeros(3), torch.zeros(3)
        a[0] = x[0]
        return a - b


def test_a_tensor_that_is_written_to_is_not_merged_with_its_twin() -> None:
    program, after = run(WritesOne(), torch.randn(3))
    x = torch.tensor([5.0, 6.0, 7.0])
    assert torch.equal(after(x), torch.tensor([5.0, 0.0, 0.0]))
    assert torch.equal(after(x), program(x))
