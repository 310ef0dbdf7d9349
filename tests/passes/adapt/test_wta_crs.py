from __future__ import annotations

from typing import Any

import pytest
import torch
from models.every_pass import UNTIED
from models.tune_net import fresh, images, table, traced
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.passes.adapt._math.column_row import choose, sampled_linear, split

CHAIN = ("text", [("adapt.wta_crs", {"targets": UNTIED})])

ROWS, KEPT = 60, 12


def skewed() -> tuple[Tensor, Tensor]:
    """Rows (60, 5) of very different sizes, and gradients of a product's result (60, 3)."""
    torch.manual_seed(0)
    sizes = torch.exp(1.5 * torch.randn(ROWS, 1, dtype=torch.float64))
    return torch.randn(ROWS, 5, dtype=torch.float64) * sizes, torch.randn(ROWS, 3).double()


def estimates(draw: Any, count: int = 3000) -> Tensor:
    x, up = skewed()
    found = []
    for _ in range(count):
        places, factors = draw(x.norm(dim=1))
        found.append((up[places] * factors[:, None]).T @ x[places])
    return torch.stack(found)


def plain(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Column-row sampling without winners."""
    p = weights / weights.sum()
    places = torch.multinomial(p, KEPT, replacement=True)
    return places, 1 / (p[places] * KEPT)


def worst_z(found: Tensor) -> float:
    x, up = skewed()
    error = found.mean(0) - up.T @ x
    return float((error / (found.std(0) / len(found) ** 0.5)).abs().max())


def test_the_gradient_is_right_on_average_and_less_noisy_than_plain_sampling() -> None:
    torch.manual_seed(1)
    ours, theirs = estimates(lambda w: choose(w, KEPT)), estimates(plain)
    assert worst_z(ours) < 4
    assert worst_z(theirs) < 4
    assert float(ours.var(0).sum()) < 0.8 * float(theirs.var(0).sum())


def test_the_check_of_the_average_sees_a_missing_probability() -> None:
    def wrong(weights: Tensor) -> tuple[Tensor, Tensor]:
        places, factors = choose(weights, KEPT)
        return places, factors.clamp(max=1.0)

    torch.manual_seed(1)
    assert worst_z(estimates(wrong)) > 20


def test_the_certain_rows_are_those_of_the_theorem() -> None:
    p = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05], dtype=torch.float64)
    sums = [0.0, 0.5, 0.7, 0.8]
    wanted = min(range(4), key=lambda c: (1 - sums[c]) / (4 - c))
    assert split(p, 4) == wanted
    assert split(torch.full((10,), 0.1), 4) == 0


def test_results_and_all_other_gradients_are_exact() -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((4, 15, 5), (3, 5), (3,)))
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    up = torch.randn(4, 15, 3, dtype=torch.float64)
    wanted = torch.nn.functional.linear(x, w, b)
    for share in (0.2, 1.0):
        y = sampled_linear(x, w, b, share, 1)
        torch.testing.assert_close(y, wanted)
        found = torch.autograd.grad(y, (x, w, b), up)
        exact = torch.autograd.grad(torch.nn.functional.linear(x, w, b), (x, w, b), up)
        torch.testing.assert_close(found[0], exact[0])
        torch.testing.assert_close(found[2], exact[2])
        assert torch.allclose(found[1], exact[1]) == (share == 1.0)


def test_a_layer_keeps_the_bytes_of_its_share() -> None:
    x, w = torch.randn(8, 100, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sampled_linear(x, w, None, 0.1, 10)
    rows = 800 // 10
    assert sum(kept) == rows * 64 * 4 + rows * 8 + 16 * 64 * 4


def test_training_uses_it_and_leaves_nothing_behind() -> None:
    before = traced(fresh(), 4, 1, 4, 4)
    x, labels = images(48)
    data = table(before.signature, x, labels, 16)
    marked = gw.passes.adapt.WtaCrs(targets=["fc"], share=0.3, least=2)(before)
    assert [n.name for n in marked.graph.nodes] == [n.name for n in before.graph.nodes]
    tune = {"epochs": 15, "lr": 0.02}
    after, exact = (gw.passes.tune.Finetune(tune=tune)(p, training=data) for p in (marked, before))
    assert not torch.equal(after.state["fc.weight"], exact.state["fc.weight"])
    hits = [float((p(x).argmax(1) == labels).float().mean()) for p in (before, after)]
    assert hits[1] > hits[0] + 0.2
    merged = gw.passes.adapt.Merge()(after)
    assert "adapters" not in merged.facts
    frozen = gw.passes.adapt.Lora(targets=["conv"], rank=1)(before)
    with pytest.raises(ModelError, match="nothing of the selected layers is trained"):
        gw.passes.adapt.WtaCrs(targets=["fc"])(frozen)


def test_it_holds_for_an_adapters_own_products() -> None:
    before = traced(fresh(), 4, 1, 4, 4)
    lora = gw.passes.adapt.Lora(targets=["fc"], rank=2)(before)
    marked = gw.passes.adapt.WtaCrs(targets=["fc"], share=0.5, least=2)(lora)
    x, labels = images(48)
    data = table(before.signature, x, labels, 16)
    tune = {"steps": 2, "lr": 0.02}
    one, other = (gw.passes.tune.Finetune(tune=tune)(p, training=data) for p in (lora, marked))
    name = "fc.lora_b.default"
    assert not torch.equal(one.state[name], other.state[name])
