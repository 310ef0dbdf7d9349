"""prune.mfac: its sub-step against a slow surgeon, the sparsity, and what it is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.tune.fisher import Fisher
from graphwright.passes.prune import Mfac
from graphwright.passes.prune._math.obs import Structure, Vector, kept_after, surgery
from graphwright.passes.prune._units import gradients
from graphwright.passes.prune._units.gradients import Draws

CHAIN = ("text", [("prune.mfac", {"sparsity": 0.5, "steps": 2, "gradients": 4, "loss": "energy"})])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(128, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


def samples(count: int = 256) -> tuple[Tensor, Tensor]:
    """Images whose class is which quarter is brightest."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 4, 4, generator=g)
    quarters = x.reshape(count, 2, 2, 2, 2).sum((2, 4)).flatten(1)
    return x, quarters.argmax(1)


@pytest.fixture(scope="module")
def trained() -> gw.Program:
    torch.manual_seed(0)
    model, (x, labels) = Net(), samples()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return gw.trace(model.eval(), (x[:4],), dynamic={"x": {0: "batch"}})


def batches(size: int = 32) -> list[dict[str, Tensor]]:
    x, labels = samples()
    return [{"x": a, "labels": b} for a, b in zip(x.split(size), labels.split(size), strict=True)]


def loss(program: gw.Program) -> float:
    x, labels = samples()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(program(x), labels))


def ran(program: gw.Program, **options: Any) -> Any:
    options = {"steps": 4, **options}
    return Mfac(**options).execute(program, Context(calibration=batches()))


def zeroed(program: gw.Program, share: float) -> gw.Program:
    """Magnitude pruning over the whole program."""
    names = ["conv.weight", "fc1.weight", "fc2.weight"]
    sizes = torch.cat([program.state[n].detach().abs().flatten() for n in names])
    limit = sizes.sort().values[int(share * len(sizes))]
    state = {n: nn.Parameter(program.state[n].detach() * (program.state[n].detach().abs() >= limit))
             for n in names}  # fmt: skip
    return program.replace(state={**program.state, **state})


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_costs_less_than_magnitude_pruning(trained: gw.Program, share: float) -> None:
    dense, mine = loss(trained), loss(ran(trained, sparsity=share).program)
    magnitude = loss(zeroed(trained, share))
    assert dense <= mine < magnitude
    assert mine - dense < 0.5 * (magnitude - dense)


@pytest.mark.parametrize("share", [0.3, 0.777, 0.95])
def test_sparsity_is_as_asked(trained: gw.Program, share: float) -> None:
    result = ran(trained, sparsity=share)
    weights = [result.program.state[f"{n}.weight"] for n in ("conv", "fc1", "fc2")]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == int(total * share)
    assert result.metrics["sparsity"] == int(total * share) / total
    assert result.program.state["fc1.bias"] is trained.state["fc1.bias"]


def test_n_of_m(trained: gw.Program) -> None:
    result = ran(trained, pattern="2:4", targets=["*", "!conv"])
    for name in ("fc1.weight", "fc2.weight"):
        kept = (result.program.state[name] != 0).reshape(-1, 4).sum(1)
        assert bool((kept == 2).all())
    assert torch.equal(result.program.state["conv.weight"], trained.state["conv.weight"])
    assert loss(result.program) < loss(trained) + 0.5


def test_n_of_m_after_zeros_lie_anywhere(trained: gw.Program) -> None:
    sparse = ran(trained, sparsity=0.7, targets=["fc1"]).program
    again = ran(sparse, pattern="2:4", targets=["fc1"]).program.state["fc1.weight"]
    assert bool(((again != 0).reshape(-1, 4).sum(1) <= 2).all())
    assert bool((again[sparse.state["fc1.weight"] == 0] == 0).all())


def test_blocks_go_together(trained: gw.Program) -> None:
    result = ran(trained, pattern="1x4", sparsity=0.5, targets=["fc1"])
    kept = (result.program.state["fc1.weight"] != 0).reshape(-1, 4)
    assert bool((kept.all(1) | ~kept.any(1)).all())
    assert int(kept.any(1).sum()) == kept.shape[0] // 2


def test_a_layer_without_the_shape_is_left_alone_and_says_so(trained: gw.Program) -> None:
    result = ran(trained, pattern="2:4")
    reasons = {a.layer: a.reason for a in result.actions}
    assert "do not divide into groups of 4" in reasons["conv"]
    assert {a.what for a in result.actions if a.layer != "conv"} == {"50.0% zeros"}


def test_surgery_is_the_slow_surgeon() -> None:
    """Scores, choice and joint update from the dense inverse, some weights gone before."""
    g = torch.randn(12, 40, dtype=torch.float64)
    weights = torch.randn(40, dtype=torch.float64)
    kept = torch.rand(40) > 0.2
    weights[~kept] = 0.0
    inverse = torch.linalg.inv(1e-3 * torch.eye(int(kept.sum())) + g[:, kept].T @ g[:, kept] / 12)
    w = weights[kept]
    scores = [float(w[k] ** 2 / (2 * inverse[k, k])) for k in range(len(w))]
    gone = sorted(range(len(w)), key=lambda k: scores[k])[: len(w) - 20]
    expected = w.clone()
    for q in gone:
        expected -= w[q] / inverse[q, q] * inverse[:, q]
    expected[gone] = 0.0
    new, left, cost = surgery(weights, kept, Fisher(g[:, kept], 1e-3), Structure(), 20)
    torch.testing.assert_close(new[kept], expected, rtol=1e-7, atol=1e-9)
    assert int(left.sum()) == 20
    assert cost == pytest.approx(sum(scores[q] for q in gone), rel=1e-7)


def test_surgery_of_blocks_is_the_slow_surgeon() -> None:
    g, w = torch.randn(9, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    inverse = torch.linalg.inv(1e-3 * torch.eye(24) + g.T @ g / 9)
    pulls = [torch.linalg.inv(inverse[i : i + 3, i : i + 3]) @ w[i : i + 3]
             for i in range(0, 24, 3)]  # fmt: skip
    scores = [float(w[3 * i : 3 * i + 3] @ pulls[i]) / 2 for i in range(8)]
    gone = sorted(range(8), key=lambda i: scores[i])[:5]
    expected = w.clone()
    for i in gone:
        expected -= inverse[:, 3 * i : 3 * i + 3] @ pulls[i]
    for i in gone:
        expected[3 * i : 3 * i + 3] = 0.0
    flags = torch.ones(24, dtype=torch.bool)
    new, _, cost = surgery(w, flags, Fisher(g, 1e-3), Structure(block=3), 9)
    torch.testing.assert_close(new, expected, rtol=1e-7, atol=1e-9)
    assert cost == pytest.approx(sum(scores[i] for i in gone), rel=1e-7)


def test_sub_steps_remove_the_same_share_each() -> None:
    counts = [kept_after(1000, 100, j, 4) for j in range(1, 5)]
    assert counts == [562, 316, 178, 100]


def test_full_matrix_from_a_mapped_file_is_the_same(
    trained: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = ran(trained, steps=2, block_size=None, sparsity=0.6).program
    monkeypatch.setattr(gradients, "MEMORY", 0)
    mapped = ran(trained, steps=2, block_size=None, sparsity=0.6).program
    assert torch.equal(in_memory.state["fc1.weight"], mapped.state["fc1.weight"])
    assert loss(mapped) < loss(zeroed(trained, 0.6))


def test_every_sub_step_draws_other_samples() -> None:
    x = torch.arange(40.0).reshape(40, 1)
    program = gw.trace(nn.Linear(1, 2).eval(), (x[:4],), dynamic={"input": {0: "batch"}})
    draws = Draws([(part,) for part in x.split(8)], program.signature, 6, 32)
    assert (draws.count, draws.size) == (6, 6)
    first, second = (
        [inputs["input"] for inputs, _ in draws.draw(torch.Generator().manual_seed(seed))]
        for seed in (0, 1)
    )
    assert len(torch.cat(first).unique()) == 36
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert Draws([(x[:3],)], program.signature, 6, 32).count == 3


def test_the_vector_of_every_kind_of_weight_is_undone(trained: gw.Program) -> None:
    weighted = [layer for layer in layers(trained) if layer.weight]
    vector = Vector.of(trained, weighted)
    back = vector.weights(vector.flat(trained.state))
    assert len(back) == 3
    assert all(torch.equal(value, trained.state[name]) for name, value in back.items())


def test_a_layer_that_no_gradient_reaches_is_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) + 0.0 * self.a(x)[:, :4]

    program = gw.trace(Gated().eval(), (torch.randn(4, 8),), dynamic="batch")
    data = [(torch.randn(16, 8),) for _ in range(2)]
    result = Mfac(steps=1).execute(program, Context(calibration=data))
    reasons = {a.layer: a.reason for a in result.actions}
    assert "scored by magnitude" in reasons["a"]
    assert reasons["b"] == ""


def test_nothing_to_do_and_refusals(trained: gw.Program) -> None:
    result = ran(trained, sparsity=0.0)
    assert all("as many zeros as asked" in a.reason for a in result.actions)
    with pytest.raises(ArgumentError, match="no multiple of the weights that 1x3"):
        Mfac(pattern="1x3")
    with pytest.raises(ArgumentError, match="needs calibration"):
        Mfac().execute(trained, Context())
    bad = trained.replace(state={**trained.state, "fc2.bias": torch.full((4,), torch.nan)})
    with pytest.raises(ModelError, match="loss of calibration batch"):
        ran(bad)
    with pytest.raises(ArgumentError, match="is 0; the model takes 1"):
        Mfac().execute(trained, Context(calibration=[{"x": torch.zeros(0, 1, 4, 4)}]))
