"""prune.otov2: trains and compresses at once; what it cuts is zero, and what it says is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.every_pass import TUNE
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import channel_groups
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.prune import Otov2
from graphwright.passes.tune import Finetune

CHAIN = ("conv", [("prune.otov2", {"sparsity": 0.25, "tune": TUNE})])


class Net(nn.Module):
    """Convolutions under batch norm with a residual, for four classes of 6x6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm1 = nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.b, self.norm2 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.c, self.head = nn.Conv2d(12, 16, 3, 2, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.a(x)))
        h = torch.relu(h + self.norm2(self.b(h)))
        return self.head(torch.relu(self.c(h)).mean((2, 3)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright row or column in one of two places: four classes."""
    g = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 1, 6, 6, generator=g)
    labels = torch.randint(0, 4, (count,), generator=g)
    for i, label in enumerate(labels.tolist()):
        where = 1 if label % 2 else 4
        if label < 2:
            x[i, 0, where] += 1
        else:
            x[i, 0, :, where] += 1
    return x, labels


def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), (images(4, 9)[0],), dynamic="batch")


def batches() -> list[tuple[Tensor, Tensor]]:
    x, labels = images(320, 0)
    return list(zip(x.split(32), labels.split(32), strict=True))


def accuracy(p: gw.Program) -> float:
    x, labels = images(200, 1)
    return float((p(x).argmax(1) == labels).double().mean())


TUNE: dict[str, Any] = {"steps": 120, "lr": 0.01}


def ran(**options: Any) -> Any:
    options = {"tune": TUNE, **options}
    return Otov2(**options).execute(program(), Context(training=batches()))


@pytest.fixture(scope="module")
def hesso() -> Any:
    return ran(sparsity=0.5)


def kept_units(p: gw.Program) -> int:
    return sum(g.units for g in channel_groups(p) if g.prunable)


def test_half_of_the_units_are_gone_and_the_rest_works(hesso) -> None:
    """Better than cutting random units of a trained network, as many of each group."""
    assert hesso.metrics["units_removed"] == 14  # of 12 + 16; the residual ties b to a
    assert kept_units(hesso.program) == 14
    assert accuracy(hesso.program) > 0.95
    dense = Finetune(tune=TUNE).execute(program(), Context(training=batches())).program
    groups = {g.name: g for g in channel_groups(dense) if g.prunable}
    kept = {g.name: g.units for g in channel_groups(hesso.program) if g.prunable}
    draw = np.random.default_rng(0)
    picks = {g: draw.permutation(g.units)[: g.units - kept[n]].tolist() for n, g in groups.items()}
    assert accuracy(gw.cut(dense, picks)) < accuracy(hesso.program) - 0.1


@pytest.mark.parametrize("kind", ["hesso", "hesso_cric", "dhspg"])
def test_the_cut_model_has_the_loss_of_the_full_sparse_one(kind: str, monkeypatch) -> None:
    seen: list[gw.Program] = []
    from graphwright.passes.prune import otov2

    cut = otov2.remove_zeros
    monkeypatch.setattr(otov2, "remove_zeros", lambda p, *rest: (seen.append(p), cut(p, *rest))[1])
    options: dict[str, Any] = {}
    if kind == "dhspg":
        options = {"penalty": 3.0, "epsilon": 0.9}
    result = ran(method=kind, **options)
    x, labels = images(200, 1)
    with torch.no_grad():
        full, small = (
            float(nn.functional.cross_entropy(p(x), labels)) for p in (*seen, result.program)
        )
    assert full == pytest.approx(small, rel=1e-5)
    assert seen[0].state["a.weight"].shape == (12, 1, 3, 3)
    assert result.metrics["units_removed"] > 0
    assert result.metrics["cut_error"] < 1e-5
    left = sum(p.numel() for p in result.program.parameters().values())
    whole = sum(p.numel() for p in program().parameters().values())
    assert result.metrics["parameters_left"] == pytest.approx(left / whole)


def test_every_group_is_accounted_for(hesso) -> None:
    assert {a.layer for a in hesso.actions} == {g.name for g in channel_groups(program())}
    reasons = {a.layer: a.reason for a in hesso.actions}
    assert "output of the program" in reasons["head.weight:0"]
    cut = {a.layer: a.what for a in hesso.actions if a.what.startswith("cut")}
    kept = {g.name: g.units for g in channel_groups(hesso.program) if g.prunable}
    assert all(what.startswith(f"cut to {kept[name]} of ") for name, what in cut.items())


def test_units_that_did_not_reach_zero_are_told_of() -> None:
    result = ran(method="dhspg", tune={"steps": 12, "lr": 1e-4})
    assert result.metrics["group_sparsity"] == 0
    reasons = " ".join(a.reason for a in result.actions)
    assert "more redundant units did not reach zero" in reasons
    assert result.warnings == (
        "dhspg removed nothing: no unit reached zero. Train for more steps or at a higher learning "
        "rate, or raise penalty",
    )
    assert result.metrics["cut_error"] == 0.0


def test_the_given_program_stays_and_seeds_repeat(hesso) -> None:
    before = program()
    copies = {n: t.clone() for n, t in before.state.items()}
    again = Otov2(sparsity=0.5, tune=TUNE).execute(before, Context(training=batches()))
    assert all(torch.equal(t, copies[n]) for n, t in before.state.items())
    for name, tensor in again.program.state.items():
        assert torch.equal(tensor, hesso.program.state[name])


def test_a_multiple_of_four_is_kept() -> None:
    result = ran(sparsity=0.5, group_divisible=4)
    kept = [g.units for g in channel_groups(result.program) if g.prunable]
    assert all(k % 4 == 0 for k in kept)


def test_targets_keep_other_groups() -> None:
    result = ran(sparsity=0.5, targets=["c"])
    assert result.program.state["a.weight"].shape[0] == 12
    assert result.program.state["c.weight"].shape[0] == 8


def test_frozen_parameters_keep_their_groups() -> None:
    given = program()
    state = dict(given.state)
    state["norm2.weight"] = nn.Parameter(state["norm2.weight"].detach(), requires_grad=False)
    frozen = given.replace(state=state)
    result = Otov2(sparsity=0.5, tune=TUNE).execute(frozen, Context(training=batches()))
    assert result.program.state["a.weight"].shape[0] == 12
    assert result.program.state["c.weight"].shape[0] == 8
    assert "weight norm2.weight is not in training" in {a.reason for a in result.actions}


def test_a_normalised_weight_is_trained_as_the_weight_it_makes() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    nn.utils.parametrizations.weight_norm(net.c)
    given = gw.trace(net, (images(4, 9)[0],), dynamic="batch")
    step = Otov2(sparsity=0.5, targets=["*"], tune=TUNE)
    result = step.execute(given, Context(training=batches()))
    assert result.metrics["units_removed"] == 14
    assert accuracy(result.program) > 0.9


def test_a_run_that_was_stopped_after_its_last_step_says_the_same(tmp_path: Path) -> None:
    step = Otov2(method="dhspg", tune={"steps": 12, "lr": 1e-4})
    context = Context(training=batches(), work=tmp_path)
    first = step.execute(program(), context)
    assert list(tmp_path.glob("tune-*.pt"))
    assert step.execute(program(), context).actions == first.actions


def test_the_last_step_counts_whatever_was_better_before() -> None:
    x, labels = images(320, 0)

    def source() -> Any:
        from graphwright.ir.data.batches import Batches, Rows

        return Batches(
            "test", program().signature, lambda: [{"x": x, "labels": labels}], "labels",
            rows=Rows(320, 32, lambda rows: {"x": x[list(rows)], "labels": labels[list(rows)]}),
        )  # fmt: skip

    step = Otov2(sparsity=0.5, tune={**TUNE, "hold_out": 0.1, "evaluate_every": 10})
    result = step.execute(program(), Context(training=source()))
    assert result.metrics["units_removed"] == 14
    assert result.metrics["last_evaluation"] < 0.5


@pytest.mark.parametrize("kind", ["hesso", "hesso_cric"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("graphwright.ir.tune.engine.SHOWN_EVERY", 0.0)
    step = Otov2(method=kind, sparsity=0.5, tune={**TUNE, "steps": 60})
    straight = step.execute(program(), Context(training=batches()))

    class Stop(Exception):
        pass

    def stop(_: str, done: int, __: int) -> None:
        if done in stops:
            stops.remove(done)
            raise Stop

    stops = [5, 21, 40]
    context = Context(training=batches(), work=tmp_path, checkpoint_seconds=0.0, progress=stop)
    for _ in range(3):
        with pytest.raises(Stop):
            step.execute(program(), context)
    resumed = step.execute(program(), context)
    assert not stops
    for name, tensor in straight.program.state.items():
        assert torch.equal(tensor, resumed.program.state[name]), name
    assert resumed.actions == straight.actions


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="needs training data"):
        Otov2()(program())
    with pytest.raises(ArgumentError, match=r"are more than the 120 of the run"):
        ran(start_pruning_step=100, pruning_steps=50)
    with pytest.raises(ArgumentError, match=r"0\.95 cannot be reached"):
        ran(sparsity=0.95, group_divisible=8)
    with pytest.raises(ModelError, match="no channel group can be pruned by training"):
        ran(targets=["head"])


SPEC = """
version: 1
training: {data: train.npz, batch_size: 32}
evaluate: {data: test.npz, metric: accuracy}
passes:
  - prune.otov2: {sparsity: 0.5, tune: {steps: 120, lr: 0.01}}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    program().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    for name, (x, labels) in {"train": images(320, 0), "test": images(200, 1)}.items():
        np.savez(tmp_path / f"{name}.npz", x=x.numpy(), labels=labels.numpy())
    outcome = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert outcome.report["evaluation"]["after"] > 0.95
    assert outcome.report["passes"][0]["metrics"]["units_removed"] == 14
    assert outcome.report["result"]["parameters"] < 0.5 * outcome.report["model"]["parameters"]
