"""Mixed features and mixed inputs: the loss, its gradients, and feature spaces that shrink."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import OwnLoss, tune
from graphwright.passes.tune.adaptive_mix import AdaptiveMix, Mixing, shrinkage

CHAIN = ("classifier", [("tune.adaptive_mix", {"tune": {"epochs": 1, "lr": 0.01}})])


class Net(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(dtype)


@cache
def program() -> gw.Program:
    return gw.trace(net(), (torch.randn(4, 2, dtype=torch.float64),), {"x": {0: "batch"}})


@cache
def data() -> tuple[Tensor, Tensor]:
    """Points (96, 2) in three sectors."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 2, generator=generator, dtype=torch.float64)
    return x, ((torch.atan2(x[:, 1], x[:, 0]) + torch.pi) / (2 * torch.pi / 3)).long().clamp(0, 2)


def batches() -> list[tuple[Tensor, Tensor]]:
    x, labels = data()
    return list(zip(x.split(24), labels.split(24), strict=True))


def test_a_linear_embedding_has_nothing_to_shrink() -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(2, 7, 5, dtype=torch.float64)
    between = 0.3 * (x @ matrix.T) + 0.7 * (x.flip(0) @ matrix.T)
    inside = (0.3 * x + 0.7 * x.flip(0)) @ matrix.T
    assert shrinkage(inside, between, 0.0, "mse") < 1e-28
    assert shrinkage(inside, between, 0.0, "cosine") == pytest.approx(-1, abs=1e-12)
    torch.manual_seed(5)
    noise = 0.05 * torch.randn_like(inside)
    torch.manual_seed(5)
    found = shrinkage(inside, inside, 0.05, "mse")
    assert found == pytest.approx(float(noise.square().mean()), rel=1e-9)


def test_the_aim_takes_no_gradient() -> None:
    inside, between = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    shrinkage(inside, between, 0.1, "mse").backward()
    assert inside.grad is not None
    assert between.grad is None


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_a_step_is_the_gradient_of_the_papers_loss(distance) -> None:
    """Against the two networks called by hand, with the share and the order that were drawn."""
    x, labels = batches()[0]
    hook = Mixing(program(), "tanh_1", 1.0, 0.0, 0.7, distance)
    options = OwnLoss(steps=1, optimizer="sgd", lr=0.1, schedule="constant")
    tuned = tune(program(), [(x, labels)], options, Context(), hooks=[hook])
    c, order = hook.share, hook.order
    assert 0 < c < 1
    model = net()
    v, inside = model.embed(x), model.embed(c * x + (1 - c) * x[order])
    z = c * v + (1 - c) * v[order]
    logits = model.head(z) + model.head(inside)
    loss = c * F.cross_entropy(logits, labels) + (1 - c) * F.cross_entropy(logits, labels[order])
    if distance == "mse":
        loss = loss + 0.7 * ((inside - z.detach()) ** 2).mean()
    else:
        loss = loss - 0.7 * F.cosine_similarity(inside, z.detach()).mean()
    assert tuned.history.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        wanted = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(
            tuned.program.state[name].detach(), wanted, rtol=1e-9, atol=1e-12
        )


def test_features_between_two_inputs_come_nearer_to_the_middle() -> None:
    x = data()[0]
    first, second = x[:48], x[48:]
    embed = net().embed

    def bent(shrink: float) -> float:
        tuning = {"steps": 200, "optimizer": "adam", "lr": 0.01}
        step = AdaptiveMix(features="embed.2", noise=0.0, shrink=shrink, tune=tuning)
        result = step(program(), training=batches(), check=False)
        embed.load_state_dict({n.removeprefix("embed."): t for n, t in result.state.items()
                               if n.startswith("embed.")})  # fmt: skip
        v = embed[:3]
        with torch.no_grad():
            middle = v((first + second) / 2) - (v(first) + v(second)) / 2
        return float(middle.norm(dim=1).mean())

    assert bent(10.0) < bent(0.0) / 2


def test_the_report_of_a_run_that_was_done_already_is_the_same(tmp_path: Path) -> None:
    step = AdaptiveMix(tune={"steps": 2, "lr": 0.01})
    context = Context(training=batches(), work=tmp_path, checkpoint_seconds=0.0)
    first, again = (step.execute(program(), context) for _ in range(2))
    assert first.metrics == again.metrics


def test_what_the_last_layer_reads_is_the_embedding() -> None:
    result = AdaptiveMix(tune={"steps": 2, "lr": 0.01}).execute(
        program(), Context(training=batches())
    )
    same = AdaptiveMix(features="tanh_1", tune={"steps": 2, "lr": 0.01}).execute(
        program(), Context(training=batches())
    )
    assert torch.equal(result.program.state["head.weight"], same.program.state["head.weight"])
    assert result.metrics["last_distance"] > 0
    assert {action.layer for action in result.actions} == {"embed.0", "embed.2", "head"}
    assert [str(n.target) for n in result.program.graph.nodes] == [
        str(n.target) for n in program().graph.nodes
    ]


SPEC = """
version: 1
training: {data: train.npz, batch_size: 24}
passes:
  - tune.adaptive_mix: {tune: {epochs: 20, lr: 0.1}}
evaluate: {data: train.npz, metric: accuracy}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    model = net(torch.float32)
    traced = gw.trace(model, (torch.randn(4, 2),), {"x": {0: "batch"}})
    traced.save(tmp_path / "net.pt2")
    x, labels = data()
    np.savez(tmp_path / "train.npz", x=x.float().numpy(), labels=labels.numpy())
    (tmp_path / "spec.yaml").write_text(SPEC)
    found = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert found.report["evaluation"]["after"] > max(0.8, found.report["evaluation"]["before"])


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.inner(x))


def test_what_cannot_be_right_is_refused() -> None:
    x = torch.randn(8, 4)
    labels = torch.randint(3, (8,))
    skip = gw.trace(Skip().eval(), (x,), {"x": {0: "batch"}})
    with pytest.raises(ModelError, match="the output has a way around 'linear'"):
        AdaptiveMix(features="inner")(skip, training=[(x, labels)])
    with pytest.raises(
        ArgumentError, match=r"no layer or node 'nothing'\. Its layers are inner, head"
    ):
        AdaptiveMix(features="nothing")(skip, training=[(x, labels)])
    with pytest.raises(ArgumentError, match="needs labels"):
        AdaptiveMix()(skip, training=[(x,)])
    table = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)).eval()
    ids = torch.randint(5, (6, 2))
    words = gw.trace(table, (ids,), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match="mixes inputs, and 'input' is int64"):
        AdaptiveMix()(words, training=[(ids, labels[:6])])
    with pytest.raises(ArgumentError, match="alpha"):
        AdaptiveMix(alpha=0.0)
