"""gw.oto: pruning in a training loop of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError


class Net(nn.Module):
    """Batch norm, dropout, and a weight that is tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.up, self.norm = nn.Linear(10, 24), nn.BatchNorm1d(24)
        self.down, self.drop = nn.Linear(24, 10), nn.Dropout(0.1)
        self.head = nn.Linear(10, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).mean(1)
        h = h + self.down(self.drop(torch.relu(self.norm(self.up(h)))))
        return self.head(h)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The token that stands in every place but two is the label."""
    g = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 11, (32,), generator=g)
    ids = labels[:, None].repeat(1, 6)
    ids[:, :2] = torch.randint(0, 11, (32, 2), generator=g)
    return ids, labels


class Run:
    def __init__(self, total: int = 60, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Net().train()
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optimizer = gw.oto(self.model, (batch(0)[0],), inner, total_steps=total,
                                dynamic="batch", **options)  # fmt: skip
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.1, total_iters=total
        )
        self.losses: list[float] = []

    def loss(self, step: int) -> Tensor:
        ids, labels = batch(step)
        return nn.functional.cross_entropy(self.model(ids), labels)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            step = self.optimizer.steps
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            self.optimizer.step(loss=loss)
            self.schedule.step()
            self.losses.append(float(loss.detach()))


@pytest.fixture(scope="module")
def trained() -> Run:
    run = Run(sparsity=0.5)
    run.train(60)
    return run


def test_the_smaller_program_is_the_trained_model(trained: Run) -> None:
    """Outputs of the module in inference mode, its running statistics among what counts."""
    small = trained.optimizer.construct()
    assert trained.model.training, "the model is left as it was"
    ids, labels = batch(999)
    trained.model.eval()
    expected = trained.model(ids).detach()
    trained.model.train()
    torch.testing.assert_close(small(ids).detach(), expected, rtol=1e-5, atol=1e-5)
    assert float((expected.argmax(1) == labels).double().mean()) > 0.9
    assert small.facts["oto"]["units_removed"] == 17  # of 10 + 24
    assert trained.optimizer.sparsity() == 0.5
    before = sum(p.numel() for p in trained.model.parameters())
    assert sum(p.numel() for p in small.parameters().values()) < 0.6 * before


def test_tied_weights_stay_tied_and_are_one_unit(trained: Run) -> None:
    small = trained.optimizer.construct()
    assert any({"embed.weight", "head.weight"} <= set(names) for names in small.aliases.values())
    width = int(trained.model.embed.weight.detach().abs().sum(0).count_nonzero())
    assert small.state["embed.weight"].shape == (11, width)
    assert trained.model.head.weight is trained.model.embed.weight


def test_it_is_an_optimizer_like_any_other(trained: Run) -> None:
    optimizer = trained.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)  # the schedule's end
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    optimizer.zero_grad()
    assert all(p.grad is None for p in trained.model.parameters())
    with pytest.raises(ArgumentError, match="cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("stop", [3, 20, 45])
def test_training_goes_on_from_its_state(trained: Run, stop: int, tmp_path) -> None:
    first = Run(sparsity=0.5)
    first.train(stop)
    saved = {"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict(),
             "schedule": first.schedule.state_dict()}  # fmt: skip
    torch.save(saved, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run(sparsity=0.5)
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.schedule.load_state_dict(state["schedule"])
    second.train(60 - stop)
    for (name, a), b in zip(trained.model.state_dict().items(), second.model.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name


def test_the_state_inside_is_cut_with_the_model(trained: Run) -> None:
    small, state = trained.optimizer.construct(), trained.optimizer.cut_state()
    parameters = small.parameters()
    assert set(state) == set(parameters)
    for name, own in state.items():
        assert own["exp_avg"].shape == own["exp_avg_sq"].shape == parameters[name].shape
        assert int(own["step"]) == 60
    rows = trained.model.up.weight.detach().abs().sum(1) > 0
    columns = trained.model.embed.weight.detach().abs().sum(0) > 0
    whole = trained.optimizer.state[trained.model.up.weight]["exp_avg"]
    assert torch.equal(state["up.weight"]["exp_avg"], whole[rows][:, columns])


def test_a_closure_gives_the_loss() -> None:
    run = Run(120, method="hesso_cric", sparsity=0.5, start_pruning_step=5, pruning_steps=20,
              sampling_steps=4, max_cycles=3)  # fmt: skip
    for step in range(120):

        def closure(step: int = step) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss(step)
            loss.backward()
            return loss

        loss = run.optimizer.step(closure)
        assert isinstance(loss, Tensor)
    assert run.optimizer.construct().facts["oto"]["units_removed"] == 17


def test_a_program_is_trained_through_its_own_parameters() -> None:
    torch.manual_seed(0)
    program = gw.trace(Net().eval(), (batch(0)[0],), dynamic="batch")
    inner = torch.optim.SGD(program.trainable().values(), lr=0.05, momentum=0.9)
    optimizer = gw.oto(program, None, inner, total_steps=40, sparsity=0.5)
    for step in range(40):
        ids, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(program(ids), labels).backward()
        optimizer.step()
    ids, _ = batch(77)
    small = optimizer.construct()
    torch.testing.assert_close(small(ids), program(ids), rtol=1e-5, atol=1e-5)
    assert small.facts["oto"]["group_sparsity"] == 0.5


def test_parameters_outside_the_optimizer_keep_their_groups() -> None:
    torch.manual_seed(0)
    model = Net()
    inner = torch.optim.AdamW([*model.up.parameters(), *model.norm.parameters()], lr=0.01)
    optimizer = gw.oto(model, (batch(0)[0],), inner, total_steps=30, sparsity=0.5)
    assert [g.name for g in optimizer.units.groups] == ["up.weight:0"]
    assert any("is not in training" in reason for _, reason in optimizer.kept)


def test_refusals() -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = batch(0)[0]
    with pytest.raises(ArgumentError, match="takes no `tune`"):
        gw.oto(model, (ids,), inner, tune={"steps": 3})
    with pytest.raises(ArgumentError, match="needs example_inputs"):
        gw.oto(model, None, inner)
    with pytest.raises(ArgumentError, match="neither is the number of steps"):
        gw.oto(model, (ids,), inner)
    with pytest.raises(ArgumentError, match="sparsity"):
        gw.oto(model, (ids,), inner, sparsity=1.5)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ModelError, match="no channel group"):
        gw.oto(model, (ids,), other, total_steps=10)
    optimizer = gw.oto(model, (ids,), inner, total_steps=10)
    with pytest.raises(ArgumentError, match="with 34 units"):
        optimizer.load_state_dict(inner.state_dict())
    cric = gw.oto(model, (ids,), inner, total_steps=200, method="hesso_cric")
    with pytest.raises(ArgumentError, match="looks at the loss"):
        cric.step()
