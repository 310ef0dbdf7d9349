"""Adapt, then unlearn: losses of weights, the Fisher diagonal, and a class made no more."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import Moment
from graphwright.passes.tune._generator.weights import (
    elastic,
    fisher_diagonal,
    repelled,
    weight_distance,
)
from graphwright.passes.tune.unlearn import Adapt, Unlearn

CHAIN = ("classifier", [("tune.unlearn", {
    "undesired": [1, 2], "critic": {"width": 8}, "tune": {"steps": 3, "lr": 0.001}, "ewc": 1.0,
})])  # fmt: skip

KINDS = ["exponential", "l2", "reciprocal"]


# ---- losses of weights


def weights(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 4, generator=g, dtype=torch.float64),
            "b": torch.randn(5, generator=g, dtype=torch.float64)}  # fmt: skip


def test_the_distance_is_half_the_mean_over_tensors_and_copies() -> None:
    own, first, second = (weights(seed) for seed in range(3))
    sums = [((own[n] - other[n]).numpy() ** 2).mean() for other in (first, second) for n in "wb"]
    assert float(weight_distance(own, [first, second])) == pytest.approx(sum(sums) / 4 / 2)
    assert float(weight_distance(own, [first])) == pytest.approx(sum(sums[:2]) / 2 / 2)
    assert float(weight_distance(own, [own])) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_repulsion_is_that_of_finite_differences(kind) -> None:
    own, others, gamma = weights(0), [weights(1), weights(2)], 0.7

    def loss(values: dict[str, Tensor]) -> Tensor:
        return repelled(kind, weight_distance(values, others), gamma)

    live = {name: value.clone().requires_grad_() for name, value in own.items()}
    found = dict(zip(live, torch.autograd.grad(loss(live), list(live.values())), strict=True))
    for name, value in own.items():
        for index in range(value.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = {n: v.clone() for n, v in own.items()}
                moved[name].view(-1)[index] += step
                ends.append(float(loss(moved)))
            slope = (ends[0] - ends[1]) / 2e-5
            assert float(found[name].flatten()[index]) == pytest.approx(slope, rel=1e-5, abs=1e-9)
    after = {name: value - 1e-3 * found[name] for name, value in own.items()}
    assert weight_distance(after, others) > weight_distance(own, others)


def test_repulsions_near_and_far() -> None:
    none, far = torch.zeros((), dtype=torch.float64), torch.tensor(1e6, dtype=torch.float64)
    assert float(repelled("exponential", none, 1.2)) == 100
    assert float(repelled("exponential", far, 1.2)) == 0
    assert float(repelled("exponential", far / 1e6, 1.2)) == pytest.approx(100 * math.exp(-1.2))
    assert float(repelled("l2", far, 1.2)) == pytest.approx(-1.2e6)
    assert float(repelled("reciprocal", far, 1.2)) == pytest.approx(1.2e-6)
    own = {name: value.requires_grad_() for name, value in weights(0).items()}
    for kind in KINDS:
        value = repelled(kind, weight_distance(own, [weights(0)]), 1.0)
        gradients = torch.autograd.grad(value, list(own.values()))
        assert math.isfinite(float(value.detach()))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_fisher_diagonal_is_the_mean_of_squared_gradients() -> None:
    """Of v . tanh(W z): a closed form for every sample."""
    torch.manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    v, z = torch.randn(4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    found = fisher_diagonal((z @ w.T).tanh() @ v, {"w": w, "unused": unused})
    slope = v * (1 - (z @ w.T).tanh().detach() ** 2)
    wanted = torch.stack([torch.outer(slope[i], z[i]) ** 2 for i in range(6)]).mean(0)
    torch.testing.assert_close(found["w"], wanted, rtol=1e-12, atol=1e-14)
    assert not found["unused"].any()
    live = {"w": w.detach() + 0.5}
    exact = 0.25 * wanted.sum() / 2
    assert float(elastic(live, {"w": w.detach()}, {"w": wanted})) == pytest.approx(float(exact))


# ---- a generator of two classes


class Generator(nn.Module):
    """Two clusters by the sign of a latent: x near (2, 0), or near (-2, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.first.weight.mul_(0.3)
            self.first.weight[0] = torch.tensor([4.0, 0.05])
            self.first.bias.zero_()
            self.last.weight.mul_(0.5)
            self.last.weight[:, 0] = torch.tensor([2.0, 0.05])
            self.last.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.first(z).tanh())


@cache
def program() -> gw.Program:
    torch.manual_seed(1)
    return gw.trace(Generator().eval(), (torch.randn(4, 2),), {"z": {0: "batch"}})


@cache
def data(size: int = 48, count: int = 8) -> list[dict[str, Tensor]]:
    """Latents, and whether what is made of each is on the right."""
    z = torch.randn(size * count, 2, generator=torch.Generator().manual_seed(2))
    labels = (program()(z).detach()[:, 0] > 0).long()
    return [{"z": a, "labels": b} for a, b in zip(z.split(size), labels.split(size), strict=True)]


OPTIONS: dict[str, Any] = {
    "ewc": 10.0, "critic": {"width": 16, "lr": 5e-3}, "r1": 0.1,
    "adapt": {"steps": 40, "lr": 0.02, "betas": (0.0, 0.99)},
    "tune": {"steps": 120, "lr": 0.02, "betas": (0.0, 0.99)},
}  # fmt: skip


@cache
def unlearned() -> tuple[gw.Program, dict[str, float]]:
    step = Unlearn(**OPTIONS, repulsion="l2")
    result = step.execute(program(), Context(training=data()))
    return result.program, dict(result.metrics)


def test_a_class_is_not_made_again_and_the_other_is_as_it_was() -> None:
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
    before, after = (p(z).detach() for p in (program(), unlearned()[0]))
    share = [float((x[:, 0] > 0).double().mean()) for x in (before, after)]
    assert share[0] > 0.4
    assert share[1] < 0.2 * share[0]
    old, new = (x[x[:, 0] < 0] for x in (before, after))
    gap = (old.mean(0) - new.mean(0)).square().sum() + (old.std(0) - new.std(0)).square().sum()
    assert float(gap) < 0.3, "of clusters 3.4 apart"
    metrics = unlearned()[1]
    assert metrics["last_distance"] > metrics["first_distance"] > 0
    assert not program().state["last.bias"].any(), "the program itself stays"


def test_the_second_stage_starts_from_the_first_weights(monkeypatch) -> None:
    """The distance that it reports first is that of the program from the adapted copies."""
    from graphwright.passes.tune import unlearn

    seen: list[Any] = []
    made = unlearn.Repel

    def kept(*args: Any) -> Any:
        seen.extend(args[4])
        return made(*args)

    monkeypatch.setattr(unlearn, "Repel", kept)
    tune = {"steps": 4, "lr": 0.01}
    step = Unlearn(copies=2, ewc=1.0, head_start=0.5, critic={"width": 8}, tune=tune)
    result = step.execute(program(), Context(training=data()))
    start = {name: program().state[name].detach() for name in seen[0]}
    wanted = float(weight_distance(start, seen))
    assert len(seen) == 2
    assert not torch.equal(seen[0]["last.weight"], seen[1]["last.weight"])
    assert result.metrics["first_distance"] == pytest.approx(wanted, rel=1e-6)


def judge() -> nn.Module:
    """A discriminator of two numbers."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))


def no_judge() -> nn.Module:
    """Three numbers for a sample."""
    return nn.Linear(2, 3)


def other_judge() -> nn.Module:
    """For samples of another form."""
    return nn.Linear(5, 1)


def test_the_penalty_is_of_the_discriminator_that_was_given(monkeypatch) -> None:
    """The loss of a step against the formulas, with the copy's weights moved."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    options = Unlearn(discriminator="test_unlearn:judge", ewc=3.0, fisher_samples=9,
                      head_start=0.0, r1=2.0, r1_every=4).options  # fmt: skip
    rows = {"z": data()[0]["z"]}
    names = list(program().trainable())
    stage = Adapt(program(), Context(), options, rows, names, "test")
    live = {n: (program().state[n].detach() + 0.1).requires_grad_() for n in names}
    made = torch.randn(5, 2, requires_grad=True)
    at = Moment(0, 4, 0, live, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    first = judge()
    torch.manual_seed(3)
    index = torch.randint(len(rows["z"]), (5,))
    real = program()(rows["z"][index]).detach().requires_grad_()
    logits = first(real)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    loss = nn.functional.softplus(-logits).mean() + nn.functional.softplus(first(made)).mean()
    loss = loss + 2.0 / 2 * 4 * slope.square().sum(1).mean()
    wanted = torch.autograd.grad(loss, list(first.parameters()))
    torch.manual_seed(3)
    value = stage.on_loss(at, torch.zeros(()), made, {"z": made})
    second = stage.critic.network
    for a, b, gradient in zip(first.parameters(), second.parameters(), wanted, strict=True):
        clear = gradient.abs() > 1e-4
        moved = (b.detach() - a.detach()) / 2e-3
        torch.testing.assert_close(moved[clear], -gradient.sign()[clear], rtol=0, atol=1e-3)
    penalty = sum((stage.fisher[n] * 0.01).sum() for n in names) * 3.0 / 2
    exact = nn.functional.softplus(-second(made)).mean() + penalty
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    g = Context().generator("fisher")
    torch.randint(len(rows["z"]), (9,), generator=g)
    z = torch.randn(9, 2, generator=g, dtype=torch.float64).float()
    net = Generator()
    net.load_state_dict(dict(program().state))
    total = torch.zeros(8, 2)
    for row in z:
        net.zero_grad()
        second(net(row[None])).sum().backward()
        total += net.first.weight.grad.square() / 9
    torch.testing.assert_close(stage.fisher["first.weight"], total, rtol=1e-4, atol=1e-8)


SPEC = """
version: 1
training: {data: marked.npz, batch_size: 32}
passes:
  - tune.unlearn:
      ewc: 10
      repulsion: l2
      critic: {width: 8}
      adapt: null
      tune: {steps: 6, lr: 0.01}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    program().save(tmp_path / "net.pt2")
    arrays = {n: torch.cat([b[n] for b in data()]).numpy() for n in ("z", "labels")}
    np.savez(tmp_path / "marked.npz", **arrays)
    (tmp_path / "spec.yaml").write_text(SPEC)
    found = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    metrics = found.report["passes"][0]["metrics"]
    assert metrics["adapt_steps"] == metrics["steps"] == 6
    assert list((tmp_path / "out").rglob("*.onnx"))


def test_what_cannot_be_right_is_refused(monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    z = torch.randn(8, 2)
    none = torch.zeros(8, dtype=torch.int64)

    def run(labels: Tensor | None = None, **options: Any) -> None:
        marks = none.clone() if labels is None else labels
        marks[:2] += labels is None
        Unlearn(**options).execute(program(), Context(training=[{"z": z, "labels": marks}]))

    with pytest.raises(ArgumentError, match=r"of the samples none has a label of \[1\]"):
        run(none)
    with pytest.raises(ArgumentError, match=r"of the samples every one has a label of \[0, 1\]"):
        run(undesired=[0, 1])
    with pytest.raises(ArgumentError, match=r"a whole number per sample: \[8, 2\] torch.float32"):
        run(z)
    with pytest.raises(ArgumentError, match="needs labels"):
        Unlearn().execute(program(), Context(training=[{"z": z}]))
    with pytest.raises(ArgumentError, match=r"gives no logits \(batch,\)"):
        run(discriminator="test_unlearn:no_judge")
    with pytest.raises(ArgumentError, match=r"does not take samples of the shape \[4, 2\]"):
        run(discriminator="test_unlearn:other_judge")
    with pytest.raises(ModelError, match="adapting has left the weights as they were"):
        run(critic={"width": 4}, adapt={"steps": 1, "lr": 1e-30}, tune={"steps": 1})
    for options, said in (
        ({"tune": {"accumulate": 2}}, "leave accumulate at 1"),
        ({"adapt": {"accumulate": 2}}, "leave accumulate at 1"),
        ({"adapt": {"optimizer": "mfac"}}, "choose another optimizer"),
        ({"r1": 0.0, "r1_every": 4}, "r1_every has no part"),
        ({"undesired": []}, "undesired"),
        ({"repulsion": "exp"}, "repulsion"),
    ):
        with pytest.raises(ArgumentError, match=said):
            Unlearn(**options)
