from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune.checkpoint import Checkpoint
from graphwright.passes.search._pooling.balance import balanced, divided, mixture
from graphwright.passes.search._pooling.places import find_places, paths, restrided
from graphwright.passes.search._pooling.supernets import Schedule, Supernets

TUNE = {"epochs": 1, "lr": 0.01}
CHAIN = ("classes", [("search.pooling", {"epochs": 1, "models": 2, "lr": 0.01, "tune": TUNE})])


class Block(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(ins, outs, 3, stride, 1), nn.BatchNorm2d(outs)
        self.second = nn.Conv2d(outs, outs, 3, 1, 1)
        self.skip = nn.Conv2d(ins, outs, 1, stride) if ins != outs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.second(torch.relu(self.norm(self.first(x)))))


class Resnet(nn.Module):
    def __init__(self, strides: tuple[int, ...] = (1, 2, 1, 2, 1)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        widths = (4, 4, 6, 6, 8, 8)
        self.blocks = nn.ModuleList(
            Block(widths[i], widths[i + 1], s) for i, s in enumerate(strides)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@cache
def resnet() -> Resnet:
    torch.manual_seed(0)
    return Resnet().eval()


def traced(net: nn.Module, side: int = 13) -> gw.Program:
    return gw.trace(net, {"x": torch.randn(2, 1, side, side)}, {"x": {0: "batch"}})


@cache
def program() -> gw.Program:
    return traced(resnet())


def test_every_placement_is_the_network_built_with_those_strides() -> None:
    places = find_places(program(), ["*"])
    assert [place.name for place in places] == [f"blocks.{i}.first" for i in range(5)]
    assert [place.halves for place in places] == [False, True, False, True, False]
    every = paths(places)
    assert len(every) == math.comb(5, 2)
    assert every[0] == (0, 1, 0, 1, 0)
    assert restrided(program(), places, every[0], "test") is program()
    x = torch.randn(3, 1, 13, 13)
    for path in every:
        net = Resnet(tuple(1 + bit for bit in path)).eval()
        for block in net.blocks:
            if block.first.stride == (2, 2) and isinstance(block.skip, nn.Identity):
                block.skip = Every()
        net.load_state_dict(resnet().state_dict())
        found = restrided(program(), places, path, "test")
        with torch.no_grad():
            torch.testing.assert_close(found(x), net(x), rtol=1e-5, atol=1e-6)
        assert found.state.keys() == program().state.keys()


class Every(nn.Module):
    """Every other place."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


def test_the_balanced_mixture_uses_every_model_equally() -> None:
    scores = torch.rand(36, 4, generator=torch.Generator().manual_seed(0)).double()
    scores[:, 0] += 0.2  # one that is better everywhere
    for temperature in (1.0, 20.0, 100.0):
        raw = mixture(scores, temperature)
        torch.testing.assert_close(raw, torch.softmax(temperature * scores, 1))
        found, uses = balanced(raw)
        torch.testing.assert_close(
            found.mean(0), torch.full((4,), 0.25).double(), atol=5e-3, rtol=0
        )
        divergence = float((found.mean(0) * (4 * found.mean(0)).log()).sum())
        assert abs(divergence) <= 1e-4
        torch.testing.assert_close(found.sum(1), torch.ones(36).double())
        torch.testing.assert_close(divided(raw, uses), found)
        assert float(raw.mean(0).max()) > 0.28  # it was not even before
    alone, uses = balanced(mixture(scores[:, :1], 5.0))
    assert torch.equal(alone, torch.ones(36, 1).double())
    assert uses == []


def batches(count: int, size: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randn(size, 1, 13, 13, generator=generator)
        found.append({"x": x, "labels": (x.mean((1, 2, 3)) > 0).long()})
    return found


def nets(models: int, epochs: int, **context: Any) -> Supernets:
    places = find_places(program(), ["*"])
    schedule = Schedule(models, epochs, 0.05, 1e-3, 0.9)
    data = batches(6)
    return Supernets(program(), places, paths(places), data[::2], data[1::2], schedule,
                     Context(seed=2, **context), scratch=True)  # fmt: skip


def test_paths_are_drawn_evenly_and_models_by_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    search = nets(2, 1)
    scores = torch.rand(10, 2, generator=torch.Generator().manual_seed(3)).double()
    drawn = torch.zeros(10, 2)

    def look(path: int, model: int, batch: Mapping[str, Tensor], *, training: bool) -> Tensor:
        drawn[path, model] += training
        weight = search.weights[model]["head.weight"]
        return weight.sum() * torch.zeros(len(batch["labels"]), 3)

    monkeypatch.setattr(search, "_logits", look)
    monkeypatch.setattr(search.optimizers[0], "step", lambda: None)
    monkeypatch.setattr(search.optimizers[1], "step", lambda: None)
    parts, search._uses = balanced(mixture(scores, 1.0))
    count = 3000
    for number in range(count):
        search.step, search.scores = number, scores.clone()
        search._one_step(0, 0, count)
    expected = count / 10 * parts
    chi = float(((drawn - expected) ** 2 / expected).sum())
    assert chi < 43.8  # 19 degrees of freedom, one in a thousand
    assert float((drawn.sum(0) / count - 0.5).abs().max()) < 0.05


def test_a_score_moves_by_a_twentieth_towards_the_accuracy() -> None:
    search = nets(2, 1)
    before = search.scores.clone()
    search._uses = []
    search._one_step(0, 0, 10)
    ((path, model),) = (search.scores != before).nonzero().tolist()
    right, n = search._right(path, model, search.validation[0])
    assert float(search.scores[path, model]) == pytest.approx(0.95 + 0.05 * right / n)


def test_a_killed_search_goes_on_to_the_same_scores(tmp_path: Path) -> None:
    def checkpoint(folder: Path | None) -> Checkpoint:
        return Checkpoint(folder, "search", "key", 0.0, print)

    whole = nets(2, 2)
    whole.run(checkpoint(None))

    class Killed(Exception):
        pass

    def kill(text: str, done: int, total: int) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        nets(2, 2, progress=kill).run(checkpoint(tmp_path))
    again = nets(2, 2)
    again.run(checkpoint(tmp_path))
    assert torch.equal(again.scores, whole.scores)
    for one, other in zip(again.weights, whole.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_trained_at_the_best_of_the_judged_places() -> None:
    step = gw.passes.search.Pooling(epochs=2, models=2, lr=0.05, tune={"epochs": 3, "lr": 0.02})
    result = step.run(program(), Context(seed=1, training=batches(6)))
    strides = {a.layer: a for a in result.actions}
    assert list(strides) == [f"blocks.{i}.first" for i in range(5)]
    assert result.metrics["placements"] == 10
    found = [p.halves for p in find_places(result.program, ["*"])] if _known(result.program) else []
    assert not found or sum(found) == 2
    x = torch.randn(2, 1, 13, 13)
    assert result.program(x).shape == (2, 3)
    assert result.program.signature == program().signature
    assert not torch.equal(result.program.state["stem.weight"], program().state["stem.weight"])


def _known(found: gw.Program) -> bool:
    """Whether no skip of it is sliced, which is no place."""
    return not any("slice" in str(node.target) for node in found.graph.nodes)


def test_what_cannot_be_searched_is_refused() -> None:
    class Flat(nn.Module):
        """A layer that needs the sizes that are there."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, 2, 1)
            self.c = nn.Conv2d(2, 2, 2)
            self.last = nn.Linear(2 * 5 * 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.c(self.b(self.a(x))).flatten(1))

    def run(net: nn.Module, side: int = 13, data: Any = None, **options: Any) -> None:
        step = gw.passes.search.Pooling(epochs=1, models=1, **options)
        step.run(traced(net, side), Context(training=data or batches(2)))

    with pytest.raises(ModelError, match="shapes do not fit"):
        run(Flat(), 12)
    with pytest.raises(ModelError, match="none of them halves"):
        run(Resnet((1, 1, 1, 1, 1)))
    with pytest.raises(ArgumentError, match="no class labels"):
        run(resnet(), 13, [{"x": torch.randn(4, 1, 13, 13)}] * 2)
    with pytest.raises(ArgumentError, match="there is one"):
        run(resnet(), 13, batches(1))
