"""prune.zig: what it removes, how much of it, and that the cut changes nothing more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import channel_groups
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ContractError, ModelError
from graphwright.ir.graph.cost import cost
from graphwright.ir.layers.selectors import layers
from graphwright.passes.prune import Zig
from graphwright.passes.prune._units import group_fisher, scores

CHAIN = ("conv", [("prune.zig", {"sparsity": 0.25})])


class Small(nn.Module):
    """Two convolutions, a residual pair, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.c, self.d = nn.Conv2d(24, 20, 3, 1, 1), nn.Conv2d(20, 24, 3, 1, 1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = torch.relu(self.norm(x + self.d(torch.relu(self.c(x)))))
        return self.head(x.mean((2, 3)))


def program() -> Any:
    torch.manual_seed(0)
    model = Small().eval()
    return gw.trace(model, (torch.randn(4, 3, 12, 12),), dynamic="batch")


def batches(labels: bool = False) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(6, 3, 12, 12, generator=g) for _ in range(2)]
    if not labels:
        return [(x,) for x in xs]
    return [{"x": x, "labels": torch.randint(0, 5, (6,), generator=g)} for x in xs]


def ran(calibration: Any = None, **options: Any) -> Any:
    return Zig(**options).execute(program(), Context(calibration=calibration))


def units(result: Any) -> dict[str, int]:
    return {g.name: g.units for g in channel_groups(result.program) if g.prunable}


def test_lowest_magnitudes_go() -> None:
    before = program()
    sums = {
        i: float(before.state["c.weight"][i].detach().double().square().sum())
        + float(before.state["c.bias"][i].detach().double().square())
        + float(before.state["d.weight"][:, i].detach().double().square().sum())
        for i in range(20)
    }
    after = ran(sparsity=0.4, scope="group", targets=["c"]).program
    kept = sorted(sorted(sums, key=lambda i: sums[i])[8:])
    assert torch.equal(after.state["c.weight"], before.state["c.weight"][kept])
    assert torch.equal(after.state["a.weight"], before.state["a.weight"])


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_a_mac_target_is_met_within_two_percent(sparsity: float) -> None:
    result = ran(sparsity=sparsity, of="macs")
    gone = 1 - cost(result.program).macs / cost(program()).macs
    assert abs(gone - sparsity) < 0.02
    assert result.metrics["macs_left"] == pytest.approx(1 - gone)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_parameter_target_is_met(scope: str) -> None:
    result = ran(sparsity=0.5, of="parameters", scope=scope)
    before, after = (sum(p.numel() for p in q.parameters().values())
                     for q in (program(), result.program))  # fmt: skip
    assert abs(1 - after / before - 0.5) < 0.03


def test_a_share_of_units_is_exact() -> None:
    assert ran(sparsity=0.5).metrics["units_removed"] == 30


def test_limits_per_group() -> None:
    multiples = units(ran(group_divisible=8))
    assert all(n % 8 == 0 or n == 20 for n in multiples.values())
    assert min(units(ran(sparsity=0.7, min_kept=5)).values()) >= 5


@pytest.mark.parametrize("score", ["cosine", "taylor", "taylor_per_batch", "hesso", "activation"])
def test_scores_with_gradients(score: str) -> None:
    labelled, energy = ran(batches(True), score=score), ran(batches(), score=score)
    assert labelled.metrics["units_removed"] == energy.metrics["units_removed"] == 30
    assert labelled.metrics["cut_error"] < 1e-5


def test_taylor_is_the_gradient_of_the_loss_times_the_slices() -> None:
    """Against torch's own gradient of the model on the same batches."""
    torch.manual_seed(0)
    model = Small().eval()
    data = batches(True)
    for batch in data:
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
    terms = [(model.c.weight, 0), (model.c.bias, 0), (model.d.weight, 1)]
    expected = sum(
        (p.detach().double() * p.grad.double() / 2).transpose(0, d).reshape(20, -1).sum(1)
        for p, d in terms
    ).abs()
    after = ran(data, score="taylor", sparsity=0.4, scope="group", targets=["c"]).program
    kept = sorted(expected.argsort()[8:].tolist())
    assert torch.equal(after.state["c.weight"], model.c.weight.detach()[kept])


def test_fisher_scores_are_those_of_the_dense_inverse() -> None:
    """1/2 w_Q ([F^-1]_QQ)^-1 w_Q of every unit, F from torch's own gradients, all parameters."""
    torch.manual_seed(0)
    model, data = Net(), samples()
    program = gw.trace(model.eval(), (data[0]["x"][:2],), dynamic="batch")
    groups = [g for g in channel_groups(program) if g.prunable]
    rows = []
    for batch in data:
        model.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    w = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    fisher = 1e-2 * torch.eye(len(w)) + torch.stack(rows).T @ torch.stack(rows) / len(rows)
    inverse = torch.linalg.inv(fisher)
    number = torch.arange(len(w)).split([p.numel() for p in model.parameters()])
    a, bias, b = number[0].view(6, 4), number[1], number[2].view(3, 6)
    expected = []
    for unit in range(6):
        q = torch.cat([a[unit], bias[unit : unit + 1], b[:, unit]])
        expected.append(float(w[q] @ torch.linalg.inv(inverse[q][:, q]) @ w[q]) / 2)
    buffer = torch.stack(rows)
    parameters = dict(program.parameters())
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    found = group_fisher.unit_costs(groups, parameters, buffer, 1e-2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-7)


class Net(nn.Module):
    """Two layers, one group of six."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def samples() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))} for _ in range(5)]


def test_fisher_removes_units_that_cost_little() -> None:
    """A large unit that nothing reads and one that is never active go first."""
    torch.manual_seed(0)
    model, data = Net(), samples()
    with torch.no_grad():
        model.b.weight[:, 2] = 0.0
        model.a.weight[2] *= 20.0
        model.a.bias[4] = -5.0
    program = gw.trace(model.eval(), (data[0]["x"][:2],), dynamic="batch")
    found = Zig(score="fisher", sparsity=0.4, batch_size=2).execute(
        program, Context(calibration=data)
    )
    after, kept = found.program, [0, 1, 3, 5]
    torch.testing.assert_close(after.state["a.weight"], model.a.weight[kept])


def test_a_unit_with_a_value_in_two_of_its_slices_counts_it_once() -> None:
    """A residual convolution reads and writes the same channels."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(x + torch.relu(self.same(x)))

    program = gw.trace(Loop().eval(), (torch.randn(2, 3),), dynamic="batch")
    group = next(g for g in channel_groups(program) if g.prunable)
    parameters = dict(program.parameters())
    w = torch.cat([p.detach().flatten() for p in parameters.values()]).double()
    costs = group_fisher.unit_costs([group], parameters, torch.zeros(2, len(w)), 0.5)
    for unit in range(4):
        same = program.state["same.weight"].detach().double()
        squares = float(same[unit].square().sum() + same[:, unit].square().sum())
        squares -= float(same[unit, unit] ** 2)
        for name, dim in (("first.weight", 0), ("first.bias", 0), ("same.bias", 0),
                          ("head.weight", 1)):  # fmt: skip
            squares += float(program.state[name].detach().double().select(dim, unit).square().sum())
        assert costs[0][unit] == pytest.approx(0.25 * squares)


def test_hesso_is_the_mean_of_five_normalised_criteria() -> None:
    draw = np.random.default_rng(0)
    sums = scores.Sums(draw.random(6), draw.random(6), draw.normal(size=6), np.full(6, 9.0))
    x, d = np.sqrt(sums.xx), np.sqrt(sums.dd)
    parts = [x, x / 9.000001, 1 - sums.xd / (x * d), abs(sums.xd), sums.xd**2 / 2]
    expected = sum(0.2 * p / np.sqrt((p**2).sum()) for p in parts)
    np.testing.assert_allclose(scores.scores("hesso", sums, np.arange(6)), expected, rtol=1e-6)


def test_every_group_is_accounted_for() -> None:
    result = ran(sparsity=0.3)
    assert {a.layer for a in result.actions} == {g.name for g in channel_groups(program())}
    reasons = {a.layer: a.reason for a in result.actions}
    assert "output of the program" in reasons["head.weight:0"]


def test_targets_keep_groups_of_other_layers() -> None:
    result = ran(sparsity=0.5, targets=["*", "!b"])
    assert result.program.state["b.weight"].shape[0] == 24
    reasons = [a.reason for a in result.actions]
    assert "layer b is not in targets" in reasons


class Products(nn.Module):
    """Weights that are read as (in, out), turned in the graph, and rebuilt from codes later on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.mid, self.bias = nn.Parameter(torch.randn(8, 10)), nn.Parameter(torch.randn(10))
        self.turned, self.head = nn.Parameter(torch.randn(10, 12)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, torch.relu(self.fc(x)), self.mid)
        return self.head(torch.relu(nn.functional.linear(torch.relu(x), self.turned.T)))


@pytest.mark.parametrize(
    ("spared", "sizes"),
    [("fc", (8, 5, 6)), ("kind:addmm", (4, 10, 6)), ("turned", (4, 5, 12)), ("none", (4, 5, 6))],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_targets_go_by_what_a_layer_gives(
    spared: str, sizes: tuple[int, int, int], quantized: bool
) -> None:
    before = gw.trace(Products().eval(), (torch.randn(4, 6),), dynamic="batch")
    names = {layer.kind: layer.name for layer in layers(before) if layer.name not in ("fc", "head")}
    if quantized:
        before = gw.passes.quantize.Int8(targets=["fc", "head"])(before)
        assert "fc.weight_codes" in before.state
    pattern = (
        [] if spared == "none" else ["!" + names["linear"] if spared == "turned" else f"!{spared}"]
    )
    after = Zig(sparsity=0.5, scope="group", targets=["*", *pattern])(before)
    assert (after.state["mid"].shape, after.state["turned"].shape[1]) == (sizes[:2], sizes[2])


def test_a_norm_has_no_channels_of_its_own() -> None:
    result = ran(sparsity=0.5, scope="group", targets=["kind:conv2d"])
    assert units(result) == units(ran(sparsity=0.5, scope="group"))


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="cannot be reached"):
        ran(sparsity=0.95, of="macs", min_kept=8)
    with pytest.raises(ArgumentError, match="needs calibration"):
        ran(score="taylor")
    with pytest.raises(ArgumentError, match="no labels"):
        ran(batches(), score="taylor", loss="cross_entropy")
    with pytest.raises(ModelError, match="no channel group"):
        ran(targets=["head"])
    with pytest.raises(ContractError):
        Zig(sparsity=0.6, max_error=1e-6)(program())


def test_sparsity_zero_changes_nothing() -> None:
    before = program()
    result = Zig(sparsity=0.0).execute(before, Context())
    assert result.program.graph is before.graph
    assert all(action.what == "kept" for action in result.actions)


def test_the_pass_runs_from_its_public_name_and_is_recorded() -> None:
    after = gw.passes.prune.Zig(sparsity=0.3)(program())
    assert after.provenance[-1].id == "prune.zig"
    x = torch.randn(2, 3, 12, 12)
    assert after(x).shape == (2, 5)
