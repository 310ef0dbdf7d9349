from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.cleanup.fold_constants import FoldConstants

CHAIN = ("text", [("cleanup.fold_constants", {})])


def fold(model: nn.Module, *inputs: torch.Tensor, **options: object) -> gw.Result:
    program = gw.trace(model.eval(), inputs)
    result = FoldConstants(**options).execute(program, Context())
    assert measure(program, result.program).relative < 1e-6  # the same kernels, run once
    return result


def calls(program: gw.Program) -> list[str]:
    return [n.target._schema.name for n in program.graph.nodes if n.op == "call_function"]


class Positions(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(6, dtype=torch.float32)
        return x + torch.sin(steps / 10.0)


def test_a_table_made_in_the_graph_becomes_a_tensor() -> None:
    result = fold(Positions(), torch.randn(2, 6))
    assert calls(result.program) == ["aten::add"]
    (table,) = result.program.state.values()
    assert torch.allclose(table, torch.sin(torch.arange(6.0) / 10))


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(4, 1) + 0.5)
        self.v = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, w)


def test_a_normalised_weight_is_folded_unless_it_must_stay_trainable() -> None:
    model = WeightNorm()
    assert calls(fold(model, torch.randn(2, 3)).program) == ["aten::linear"]
    kept = fold(model, torch.randn(2, 3), parameters=False).program
    assert set(kept.state) == {"g", "v"}


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.t()


def test_a_plain_move_of_a_weight_stays_and_no_copy_is_made() -> None:
    result = fold(Transposed(), torch.randn(2, 4))
    assert list(result.program.state) == ["w"]


class Outer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(600, dtype=torch.float32)
        return x + (steps[:, None] * steps[None, :]).cos()


def test_a_result_beyond_the_budget_stays_with_its_reason() -> None:
    result = fold(Outer(), torch.randn(600, 600), max_growth_mb=1.0)
    assert any("would add 1.4 MB" in a.reason for a in result.actions)
    assert "aten::cos" in calls(result.program)


class Written(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(3, 3)
        table[:, 0] = x[0]
        return table + 1.0


def test_a_tensor_that_is_written_to_is_no_constant() -> None:
    program = gw.trace(Written(), (torch.randn(3),))
    after = FoldConstants()(program)
    for x in (torch.randn(3), torch.ones(3)):
        assert torch.equal(after(x), program(x))


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3)


def test_random_numbers_are_not_frozen() -> None:
    with pytest.warns(UserWarning, match="other results on every call"):
        program = gw.trace(Noise(), (torch.zeros(3),))
    after = FoldConstants().execute(program, Context()).program
    assert after.graph is program.graph
