"""prune.udfc: the closed form, the chains it finds, and what the repair is worth."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models.udfc_pair import Pair, channels, ran, traced
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import channel_groups
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.repair.chains import Chain, find_chain
from graphwright.ir.repair.closed_form import Channels, candidates, diagonal, nonneg, ridge
from graphwright.passes.prune import Udfc

CHAIN = ("conv", [("prune.udfc", {"ratio": 0.25, "weight_bits": 8})])


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms whose running statistics are those of the noise that the tests feed."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=g) + 0.5
            module.bias.data = torch.randn(module.num_features, generator=g) * 0.3
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.randn(64, 3, 10, 10, generator=g))
    return model.eval()


def objective(c: Channels, s: Tensor, l1: float, l2: float) -> Tensor:
    y, e = c.damaged, c.offsets[c.kept]
    fit = (c.filters - s.T @ y).square().sum() + l1 * (c.offsets - s.T @ e).square().sum()
    return fit + l2 * (s - c.nothing).square().sum()


@pytest.mark.parametrize("rounded", [False, True])
def test_ridge_is_the_least_squares_solution_of_the_stacked_system(rounded: bool) -> None:
    c, l1, l2 = channels(rounded), 0.7, 0.3
    a = torch.cat([c.damaged, l1**0.5 * c.offsets[c.kept][:, None]], 1).T
    b = torch.cat([c.filters, l1**0.5 * c.offsets[:, None]], 1).T
    a = torch.cat([a, l2**0.5 * torch.eye(6).double()])
    b = torch.cat([b, l2**0.5 * c.nothing])
    found = ridge(c, l1, l2)
    torch.testing.assert_close(found, torch.linalg.lstsq(a, b).solution, rtol=1e-8, atol=1e-10)
    s = found.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(c, s, l1, l2), s)
    assert float(slope.abs().max()) < 1e-10
    assert objective(c, found, l1, l2) < objective(c, c.nothing, l1, l2)


def test_nonneg_meets_its_optimality_conditions() -> None:
    c, l1, l2 = channels(), 1.0, 0.5
    s = nonneg(c, l1, l2).requires_grad_()
    (slope,) = torch.autograd.grad(objective(c, s, l1, l2), s)
    s = s.detach()
    for j in (1, 4, 7, 9):
        assert float(s[:, j].min()) >= 0
        assert float(slope[:, j].min()) > -1e-8  # nothing would be gained by growing
        assert float((slope[:, j] * s[:, j]).abs().max()) < 1e-8
    assert torch.equal(s[:, c.kept], torch.eye(6).double())


def test_diagonal_scales_each_channel_best() -> None:
    c, l1, l2 = channels(True), 1.0, 0.5
    s = diagonal(c, l1, l2).requires_grad_()
    (slope,) = torch.autograd.grad(objective(c, s, l1, l2), s)
    rows = torch.arange(6)
    assert float(slope[rows, c.kept].abs().max()) < 1e-10
    assert int((s.detach() != 0).sum()) == 6


def test_first_candidate_changes_nothing() -> None:
    c = channels()
    found = list(candidates(c, "auto", 1.0, None))
    assert found[0][0] == "none"
    assert torch.equal(found[0][1], c.nothing)
    assert all(torch.equal(s[:, c.kept], c.nothing[:, c.kept]) for _, s in found)
    assert [name for name, _ in candidates(c, "none", 1.0, None)] == ["none"]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_positive_multiple_of_another_channel_goes_without_a_trace(factor: float) -> None:
    torch.manual_seed(0)
    model = Pair(8)
    with torch.no_grad():
        model.a.weight[5] = 0.3 * model.a.weight[2]
        model.a.bias[5] = 0.3 * model.a.bias[2]
    settled(model)
    with torch.no_grad():  # the same pre-activation as channel 2, times the factor
        s = torch.sqrt(model.norm.running_var + model.norm.eps)
        gain = model.norm.weight[2] / s[2] * factor
        model.norm.weight[5] = gain / 0.3 * s[5]
        model.norm.bias[5] = factor * (model.norm.bias[2] - model.norm.running_mean[2]
                                       * model.norm.weight[2] / s[2])  # fmt: skip
        model.norm.bias[5] += model.norm.weight[5] / s[5] * model.norm.running_mean[5]
        model.a.weight[[0, 1, 3, 4, 6, 7]] *= 3  # the double is the smallest
    program = traced(model)
    result = ran(program, ratio=0.125, shrinkage=1e-9)
    assert result.program.state["a.weight"].shape[0] == 7
    x = torch.randn(4, 3, 10, 10)
    torch.testing.assert_close(result.program(x), program(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ran(program, ratio=0.125, repair="none").program(x), program(x),
                              atol=1e-2)  # fmt: skip


@cache
def correlated(seed: int, act: nn.Module | None = None) -> gw.Program:
    """A pair whose filters have a low rank beside some noise."""
    torch.manual_seed(seed)
    model = Pair(24, act)
    with torch.no_grad():
        low = torch.randn(24, 6) @ torch.randn(6, 27) / 6**0.5
        model.a.weight.copy_((low + 0.3 * torch.randn(24, 27)).reshape(24, 3, 3, 3) / 5)
    return traced(settled(model, seed))


def error(program: gw.Program, **options: Any) -> float:
    x = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        gap = ran(program, **options).program(x) - program(x)
        return float(gap.norm() / program(x).norm())


@pytest.mark.parametrize("repair", ["ridge", "nonneg", "features", "auto"])
def test_repair_helps_on_correlated_filters(repair: str) -> None:
    better = 0
    for seed in range(8):
        program = correlated(seed)
        better += error(program, ratio=0.25, repair=repair) < error(program, ratio=0.25,
                                                                    repair="none")  # fmt: skip
    assert better >= 7


def test_repair_always_helps_without_an_activation() -> None:
    identity = nn.Identity()
    for seed in range(3):
        program = correlated(seed, identity)
        with_repair = error(program, ratio=0.25, repair="ridge", shrinkage=1e-6)
        assert with_repair < error(program, ratio=0.25, repair="none")


class Several(nn.Module):
    """Residual blocks, a depthwise convolution, flattening, several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.down = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.wide, self.deep = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 10, 3, groups=10)
        self.point, self.side = nn.Conv2d(10, 6, 1), nn.Conv2d(10, 6, 3)
        self.last = nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(8 * 9, 12), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(x)))
        x = torch.relu(self.wide(x))
        x = torch.nn.functional.max_pool2d(self.last(torch.relu(self.point(self.deep(x)))), 2)
        x = torch.relu(self.fc1(torch.relu(x).flatten(1)))
        return self.fc2(x) + self.fc3(x)


def test_chains_and_reasons() -> None:
    torch.manual_seed(0)
    program = traced(Several())
    result = ran(program, ratio=0.25)
    what = {a.layer: (a.what, a.reason) for a in result.actions}
    assert what["up"][0].startswith("cut to 9 of 12 channels")
    assert "made by" in what["stem"][1]
    assert what["wide"][0].startswith("cut to 8 of 10")
    assert "repair" not in what["wide"][0].replace("no repair", "")
    assert what["last"][0].startswith("cut to 6 of 8")
    assert what["fc1"][0].startswith("cut to 9 of 12")
    assert "output" in what["fc2"][1]
    shapes = {n: tuple(t.shape) for n, t in result.program.state.items()}
    assert shapes["fc1.weight"] == (9, 54)
    assert shapes["fc2.weight"] == shapes["fc3.weight"] == (4, 9)
    assert shapes["deep.weight"] == (8, 1, 3, 3)
    assert result.program(torch.randn(2, 3, 10, 10)).shape == (2, 4)


def test_columns_of_a_flattened_reader_belong_to_their_channel() -> None:
    program = traced(Several())
    chains = [find_chain(program, g, program.state) for g in channel_groups(program) if g.prunable]
    chain = next(c for c in chains if isinstance(c, Chain) and c.producer.name == "last")
    assert torch.equal(chain.readers[0].columns, torch.arange(72).reshape(8, 9))
    group = chain.group
    for channel, unit in enumerate(chain.units.tolist()):
        assert group.slices(unit)["last.weight", 0].tolist() == [channel]


def test_kept_channels_of_a_reader_change_and_the_producer_does_not() -> None:
    program = correlated(1)
    result = ran(program, ratio=0.25)
    before, after = program.state["a.weight"], result.program.state["a.weight"]
    sizes = (before.detach().flatten(1) * (program.state["norm.weight"] / torch.sqrt(
        program.state["norm.running_var"] + 1e-5)).detach()[:, None]).norm(dim=1)  # fmt: skip
    kept = sizes.argsort()[6:].sort().values
    assert torch.equal(after, before[kept])
    assert not torch.equal(result.program.state["b.weight"], program.state["b.weight"][:, kept])
    assert result.metrics["error_after_repair"] < result.metrics["error_before_repair"]


def test_no_data_is_read() -> None:
    class Untouchable:
        def __iter__(self) -> Any:
            raise AssertionError("read")

    context = Context(calibration=Untouchable(), training=Untouchable())
    result = Udfc(ratio=0.25, weight_bits=6).execute(correlated(0), context)
    assert result.metrics["chains"] == 1


def test_nothing_asked_changes_nothing() -> None:
    program = correlated(0)
    result = ran(program, ratio=0.0)
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(result.program(x), program(x))
    assert torch.equal(result.program.state["b.weight"], program.state["b.weight"])
    assert "less than one channel" in {a.layer: a.reason for a in result.actions}["a"]


def test_targets() -> None:
    result = ran(traced(Several()), ratio=0.25, targets=["fc1"])
    assert result.program.state["up.weight"].shape[0] == 12
    assert result.program.state["fc1.weight"].shape[0] == 9
    assert [a.layer for a in result.actions] == ["fc1"]


def test_pruned_and_rounded_in_one_solution() -> None:
    program = correlated(0)
    result = ran(program, ratio=0.25, weight_bits=4)
    codes = result.program.state["a.weight_codes"]
    assert codes.shape[0] == 18
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == 7
    plain = error(program, ratio=0.25, weight_bits=4, repair="none")
    assert error(program, ratio=0.25, weight_bits=4) < plain


def test_refusals() -> None:
    program = correlated(0)
    bad = {**program.state, "norm.running_var": torch.full((24,), float("nan"))}
    with pytest.raises(ModelError, match="NaN"):
        ran(program.replace(state=bad), ratio=0.25)
    with pytest.raises(ArgumentError, match="weight_bits"):
        Udfc(weight_bits=9)
