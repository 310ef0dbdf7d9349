from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.cleanup.fold_batch_norm import FoldBatchNorm

CHAIN = ("conv", [("cleanup.fold_batch_norm", {})])

aten = torch.ops.aten


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters as after training: nothing at its default."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            size = norm.running_mean.shape
            norm.running_mean.copy_(torch.randn(size, generator=generator))
            norm.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            if norm.affine:
                norm.weight.data.copy_(torch.randn(size, generator=generator))
                norm.bias.data.copy_(torch.randn(size, generator=generator))
    return model.double().eval()


def norms(program: gw.Program) -> int:
    return len(program.graph.find_nodes(op="call_function", target=aten.batch_norm.default))


def fold(model: nn.Module, *shape: int) -> tuple[gw.Program, gw.Result]:
    x = torch.randn(*shape, dtype=torch.float64)
    program = gw.trace(with_statistics(model), (x,))
    result = FoldBatchNorm().execute(program, Context())
    # Float64 throughout: what is left is rounding of a few hundred terms, not a wrong formula.
    assert measure(program, result.program).relative < 1e-12
    return program, result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda b: nn.Conv1d(4, 6, 3, padding=1, bias=b), nn.BatchNorm1d, (2, 4, 9)),
        (lambda b: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=b), nn.BatchNorm2d, (2, 4, 9, 9)),
        (lambda b: nn.Conv2d(4, 6, 3, padding="same", bias=b), nn.BatchNorm2d, (2, 4, 9, 9)),
        (lambda b: nn.Conv2d(4, 6, 1, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
        (lambda b: nn.Conv3d(4, 6, 2, bias=b), nn.BatchNorm3d, (2, 4, 5, 5, 5)),
        (lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
        (lambda b: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
        (lambda b: nn.ConvTranspose1d(4, 6, 2, bias=b), nn.BatchNorm1d, (2, 4, 5)),
        (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (5, 4)),
    ],
)
def test_behind_a_layer(layer, norm, shape, affine: bool, bias: bool) -> None:
    program, result = fold(nn.Sequential(layer(bias), norm(6, affine=affine)), *shape)
    assert norms(program) == 1
    assert norms(result.program) == 0
    assert "0.weight" in result.program.state


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), (2, 4, 9, 9)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 9)),
        (nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False), (5, 4)),
    ],
)
def test_before_a_layer(norm: nn.Module, layer: nn.Module, shape: tuple[int, ...]) -> None:
    _, result = fold(nn.Sequential(nn.ReLU(), norm, layer), *shape)
    assert norms(result.program) == 0
    assert result.actions[-1].what == "folded into 2, which reads it"


def test_a_padding_layer_behind_it_keeps_the_norm() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1))
    _, result = fold(model, 2, 4, 9, 9)
    assert norms(result.program) == 1
    assert "pads with zeros" in result.actions[-1].reason


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.cat([self.a(x), x, self.b(x)], 1))


def test_across_a_concatenation_every_branch_folds_or_keeps_its_part() -> None:
    _, result = fold(Concat(), 2, 3, 6, 6)
    assert norms(result.program) == 1
    assert {a.what for a in result.actions} == {
        "split over a concatenation", "folded into a", "folded into b", "kept",
    }  # fmt: skip


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.first = nn.BatchNorm2d(3)
        self.second = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        return self.norm(h) + h


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Shared(), "shares conv.weight"), (ReadTwice(), "also read by other nodes")],
)
def test_it_stays_where_folding_would_change_something_else(model: nn.Module, reason: str) -> None:
    program, result = fold(model, 2, 3, 4, 4)
    assert norms(result.program) == norms(program)
    assert reason in result.actions[0].reason


def test_a_norm_in_training_mode_stays() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    program = gw.trace(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),)).train()
    result = FoldBatchNorm().execute(program, Context())
    assert norms(result.program) == 1
    assert "training mode" in result.actions[0].reason


def test_gamma_and_beta_are_remembered_under_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    _, result = fold(model, 2, 3, 4, 4)
    remembered = result.program.facts["cleanup.fold_batch_norm"]["0"]
    assert remembered["gamma"] == pytest.approx(model[1].weight.tolist())
    assert remembered["beta"] == pytest.approx(model[1].bias.tolist())


def test_a_second_run_changes_nothing() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 2, 3, 4, 4)
    again = FoldBatchNorm().execute(result.program, Context()).program
    assert again.graph is result.program.graph
