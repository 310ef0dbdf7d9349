from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import every_pass
from models.adapters import moved
from models.every_pass import UNTIED, run
from models.shown_file import shown_file
from torch import Tensor, nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.program import Program
from graphwright.passes.adapt._math.sampling import continued

TASK = 24
"""The task: digits under a fixed exchange of pixel rows, which the base models have not seen."""


class Net(nn.Module):
    """A network for the digits of scikit-learn, (batch, 64) to 10 logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.head = (
            nn.Linear(64, width),
            nn.Linear(width, width),
            nn.Linear(width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


class Judge(nn.Module):
    """Two logits, of made and of real inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def shifted(x: Tensor) -> Tensor:
    """A digit with its rows moved by three, in negative."""
    return 1 - x.reshape(-1, 8, 8).roll(3, 1).flatten(1)


_lora = ("adapt.lora", {"targets": UNTIED, "rank": 2})
SOURCE = shown_file("transfer-source.pt2", lambda path: moved(
    run(*_lora, every_pass.traced("text"), "text", 0)).save(path))  # fmt: skip
SEEDS = shown_file("transfer-seeds.npz", lambda path: np.savez(
    path, ids=np.arange(16).reshape(2, 8)))  # fmt: skip
CHAIN = ("text", [_lora, ("adapt.transfer", {
    "source": str(SOURCE), "seeds": str(SEEDS),
    "generator": "models.adapters:made_ids", "samples": 8, "batch_size": 4,
    "tune": {"epochs": 1, "loss": "kl"}})])  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.from_numpy(found.data[order]).float() / 16, torch.from_numpy(found.target[order])


TRAIN, HELD_OUT = slice(0, 1200), slice(1200, None)


def generate(seeds: dict[str, Tensor], count: int, random: torch.Generator) -> dict[str, Tensor]:
    """Mixtures of two seeds, moved, with noise; every third one is noise alone."""
    x = seeds["x"]
    pairs = torch.randint(len(x), (2, count), generator=random)
    share = torch.rand(count, 1, generator=random) * 0.5
    made = (1 - share) * x[pairs[0]] + share * x[pairs[1]]
    made = made + 0.1 * torch.randn(made.shape, generator=random)
    noise = torch.rand(made.shape, generator=random)
    is_noise = torch.rand(count, 1, generator=random) < 1 / 3
    return {"x": torch.where(is_noise, noise, made)}


def fitted(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def traced(net: nn.Module) -> Program:
    result: Program = gw.trace(net, {"x": digits()[0][:4]}, dynamic={"x": {0: "batch"}})
    return result


@cache
def folder() -> Path:
    """Source with its adapter, discriminator and seeds, as they are kept when the task is done."""
    place = Path(tempfile.mkdtemp(prefix="graphwright-transfer-"))
    torch.manual_seed(0)
    x, y = (t[TRAIN] for t in digits())
    source = traced(fitted(Net(64), x, y, 200))
    data = [{"x": shifted(x), "labels": y}]
    rows = [{k: t[i : i + 64] for k, t in data[0].items()} for i in range(0, 1200, 64)]
    lora = gw.passes.adapt.Lora(rank=8, also_train=[])(source)
    tuned = gw.passes.tune.Finetune(tune={"epochs": 15, "lr": 0.01})(lora, training=rows)
    tuned.save(place / "source.pt2")
    seeds = shifted(x[: TASK * 4])
    np.savez(place / "seeds.npz", x=seeds.numpy())
    made = generate({"x": seeds}, 1200, torch.Generator().manual_seed(3))["x"]
    both = torch.cat([made, shifted(x)])
    real = torch.cat([torch.zeros(1200), torch.ones(1200)]).long()
    judge = fitted(Judge(), both, real, 60)
    judge_program = gw.trace(judge, {"x": both[:4]}, dynamic={"x": {0: "batch"}})
    judge_program.save(place / "judge.pt2")
    target = traced(fitted(Net(32), x, y, 200))
    target.save(place / "target.pt2")
    (place / "made_digits.py").write_text(
        Path(__file__).read_text(encoding="utf-8"), encoding="utf-8"
    )
    return place


def target() -> Program:
    base = gw.load(folder() / "target.pt2")
    return gw.passes.adapt.Lora(rank=8)(base)


def accuracy(program: Any) -> float:
    x, y = (t[HELD_OUT] for t in digits())
    with torch.no_grad():
        return float((program(shifted(x)).argmax(1) == y).double().mean())


def options(**changes: Any) -> dict[str, Any]:
    place = folder()
    return {
        "source": str(place / "source.pt2"), "seeds": str(place / "seeds.npz"),
        "discriminator": str(place / "judge.pt2"), "generator": "made_digits:generate",
        "samples": 512, "tune": {"epochs": 30, "lr": 0.01, "loss": "kl"}, **changes,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def generator_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder()))
    monkeypatch.setitem(sys.modules, "made_digits", sys.modules[__name__])


class Closed:
    """Data that nobody may read."""

    def __iter__(self) -> Any:
        raise AssertionError("the data of the task was read")


def test_the_task_goes_over_without_its_data_and_the_base_stays() -> None:
    before = target()
    run = gw.passes.adapt.Transfer(**options())
    after = run(before, training=Closed(), calibration=Closed(), check=False)
    teacher, base, found = (accuracy(p) for p in (gw.load(folder() / "source.pt2"), before, after))
    assert found > base + 0.2
    assert found >= 0.9 * teacher
    adapter = {name for name in after.trainable()}
    for name, tensor in before.state.items():
        assert torch.equal(after.state[name], tensor) == (name not in adapter)


def test_made_inputs_that_are_kept_are_nearer_to_the_real_ones() -> None:
    run = gw.passes.adapt.Transfer(**options(samples=256))
    from graphwright.ir.context import Context

    context = Context(folder=folder())
    seeds = run._seeds(target(), context)
    real = shifted(digits()[0][TRAIN][:256])
    judge = gw.load(folder() / "judge.pt2")
    filtered, candidates = run._made(target(), seeds, judge, context)
    unfiltered, all_ = run._made(target(), seeds, None, context)
    assert len(filtered["x"]) == len(unfiltered["x"]) == 256 == all_ < candidates
    assert distance(filtered["x"], real) < distance(unfiltered["x"], real)


def distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel of the median distance."""
    both = torch.cat([a, b])
    squares = torch.cdist(both, both).square()
    kernel = (-squares / squares.median()).exp()
    n = len(a)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())


class Words(nn.Module):
    """A language model that says the word after the last one, and now and then the one after."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 12)
        with torch.no_grad():
            self.table.weight.copy_(8 * torch.eye(12).roll(1, 1) + 6 * torch.eye(12).roll(2, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_the_base_model_makes_texts_of_its_own() -> None:
    ids = (torch.arange(3)[:, None] + torch.arange(5)) % 12
    program = gw.trace(Words().eval(), {"input_ids": ids},
                       dynamic={"input_ids": {0: "batch", 1: "length"}})  # fmt: skip
    made = continued(program, {"input_ids": ids}, 40, 0.7, torch.Generator().manual_seed(0))
    steps = made["input_ids"].diff(dim=1) % 12
    assert made["input_ids"].shape == (40, 5)
    assert set(steps.flatten().tolist()) <= {1, 2}
    assert len(made["input_ids"].unique(dim=0)) > 5
    again = continued(program, {"input_ids": ids}, 40, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(made["input_ids"], again["input_ids"])


def test_the_loss_follows_the_source_where_none_is_given() -> None:
    made = gw.passes.adapt.Transfer(source="a.pt2", seeds="b.npz", tune={"epochs": 2})
    assert made.resolved_options()["tune"]["loss"] == "kl"


def test_refusals() -> None:
    base = gw.load(folder() / "target.pt2")
    with pytest.raises(ModelError, match="the model has no adapter to train"):
        gw.passes.adapt.Transfer(**options())(base)
    with pytest.raises(ArgumentError, match="loss mse does not follow the source"):
        gw.passes.adapt.Transfer(**options(tune={"loss": "mse"}))(target())
    with pytest.raises(ModelError, match="goes on from token ids"):
        gw.passes.adapt.Transfer(**options(generator="base"))(target())
    judge = str(folder() / "judge.pt2")
    with pytest.raises(ModelError, match=r"the source gives .*\[2\], and this model .*\[10\]"):
        gw.passes.adapt.Transfer(**options(source=judge))(target())
    with pytest.raises(ModelError, match="different samples that the discriminator takes for real"):
        gw.passes.adapt.Transfer(**options(generator="made_digits:copies", most=1))(target())
    with pytest.raises(ArgumentError, match="the generator gives None for 'x'"):
        gw.passes.adapt.Transfer(**options(generator="made_digits:nothing"))(target())


def copies(seeds: dict[str, Tensor], count: int, random: torch.Generator) -> dict[str, Tensor]:
    return {"x": seeds["x"][:1].repeat(count, 1)}


def nothing(seeds: dict[str, Tensor], count: int, random: torch.Generator) -> dict[str, Tensor]:
    return {}
