"""prune.udfc with `repair: merge`: Neuron Merging, against the paper's formulas by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.repair.closed_form import Channels
from graphwright.ir.repair.merging import merge
from graphwright.passes.prune import Udfc
from graphwright.passes.quantize import Udfc as QuantizeUdfc


class Pair(nn.Module):
    """Convolution, batch norm, activation, convolution; everything but the filters random."""

    def __init__(self, filters: Tensor, act: nn.Module | None = None, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        channels = len(filters)
        self.a = nn.Conv2d(filters.shape[1], channels, filters.shape[2], bias=False)
        self.norm, self.act = nn.BatchNorm2d(channels), act or nn.ReLU()
        self.b = nn.Conv2d(channels, channels, 3, groups=groups)
        self.c = nn.Conv2d(channels, 3, 1) if groups > 1 else nn.Identity()
        self.double().eval()
        with torch.no_grad():
            self.a.weight.copy_(filters)
            self.norm.weight.copy_(torch.rand(channels) + 0.5)
            self.norm.bias.copy_(torch.randn(channels))
            self.norm.running_mean.copy_(torch.randn(channels))
            self.norm.running_var.copy_(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.act(self.norm(self.a(x)))))


X = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def with_a_multiple(factor: float = 0.2, act: nn.Module | None = None, groups: int = 1) -> Pair:
    """Channel 1 is `factor` times channel 4 before the ReLU, by another norm; it is the smallest.

    Its filter is 0.05 times that of channel 4, and beta solves for equal zeros.
    """
    filters = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    filters[1] = 0.05 * filters[4]
    model = Pair(filters, act, groups)
    n = model.norm
    with torch.no_grad():
        sigma = torch.sqrt(n.running_var + n.eps)
        n.weight[1] = factor / 0.05 * n.weight[4] / sigma[4] * sigma[1]
        offset = n.bias[4] - n.weight[4] / sigma[4] * n.running_mean[4]
        n.bias[1] = factor * offset + n.weight[1] / sigma[1] * n.running_mean[1]
    return model


def traced(model: nn.Module, x: Tensor = X) -> gw.Program:
    name = "input" if isinstance(model, nn.Sequential) else "x"
    return gw.trace(model.eval(), (x,), dynamic={name: {0: "batch"}})


def ran(program: gw.Program, **options: Any) -> Any:
    return Udfc(**{"repair": "merge", **options}).execute(program, Context())


def test_a_multiple_of_a_kept_channel_goes_without_a_trace() -> None:
    program = traced(with_a_multiple())
    assert program.state["a.weight"].dtype == torch.float64
    result = ran(program, ratio=0.17)
    after = result.program
    assert torch.equal(after.state["a.weight"], program.state["a.weight"][[0, 2, 3, 4, 5]])
    torch.testing.assert_close(after(X), program(X), rtol=1e-12, atol=1e-12)
    lost = ran(program, ratio=0.17, repair="none").program
    assert not torch.allclose(lost(X), program(X), atol=1e-2)
    wanted = program.state["b.weight"].clone()
    wanted[:, 4] += 0.2 * wanted[:, 1]
    torch.testing.assert_close(
        after.state["b.weight"], wanted[:, [0, 2, 3, 4, 5]], rtol=1e-12, atol=1e-12
    )
    assert "repair merge (1 of 1): error" in next(a.what for a in result.actions if a.layer == "a")


def test_the_scale_by_hand() -> None:
    """|w_1| = 5, |w_0| = 10: S = 5/10 (2/4) / (3/2) = 1/6."""
    model = Pair(torch.tensor([[6.0, 8.0], [3.0, 4.0]]).double().reshape(2, 2, 1, 1))
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([3.0, 2.0]))
        model.norm.running_var.copy_(torch.tensor([4.0, 16.0]).double() - model.norm.eps)
    program = traced(model)
    weight = program.state["b.weight"]
    after = ran(program, ratio=0.5).program.state["b.weight"]
    torch.testing.assert_close(after[:, 0], weight[:, 0] + weight[:, 1] / 6, rtol=1e-6, atol=0)


def by_hand(
    w: Any, gamma: Any, beta: Any, mean: Any, sigma: Any, kept: list[int], balance: float,
    threshold: float,
) -> Any:  # fmt: skip
    """The paper's formulas, channel by channel, on plain filters and batch norms."""
    found = np.zeros((len(kept), len(w)))
    for p in range(len(w)):
        if p in kept:
            found[kept.index(p), p] = 1
            continue
        cosines, scales, offsets = [], [], []
        for k in kept:
            s = np.linalg.norm(w[p]) / np.linalg.norm(w[k])
            scale = s * (gamma[p] / gamma[k]) * (sigma[k] / sigma[p])
            shift = gamma[p] / sigma[p] * (s * (mean[k] - sigma[k] * beta[k] / gamma[k]) - mean[p])
            cosines.append(w[p] @ w[k] / np.linalg.norm(w[p]) / np.linalg.norm(w[k]))
            scales.append(scale)
            offsets.append(abs(shift + beta[p]) / scale)
        unit = (np.array(offsets) - min(offsets)) / (max(offsets) - min(offsets))
        best = int(np.argmin(balance * (1 - np.array(cosines)) + (1 - balance) * unit))
        if cosines[best] >= threshold:
            found[best, p] = scales[best]
    return found


@pytest.mark.parametrize("balance", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_every_choice_is_the_papers(balance: float, threshold: float) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(12, 4))
    gamma, sigma = rng.uniform(0.5, 2, 12), rng.uniform(0.5, 2, 12)
    beta, mean = rng.normal(size=12), rng.normal(size=12)
    kept = [0, 2, 3, 7, 8, 11]
    gain = gamma / sigma
    channels = Channels(
        torch.tensor(w * gain[:, None]), torch.tensor(beta - gain * mean),
        torch.tensor(gamma), torch.tensor(kept), torch.tensor((w * gain[:, None])[kept]),
    )  # fmt: skip
    mixture, count = merge(channels, True, balance, threshold)
    wanted = by_hand(w, gamma, beta, mean, sigma, kept, balance, threshold)
    np.testing.assert_allclose(mixture.numpy(), wanted, rtol=1e-10)
    assert count == np.count_nonzero(wanted) - len(kept)
    assert count > 0


def test_without_a_norm_filter_and_bias_are_one_vector() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    program = traced(model, torch.randn(4, 5).double())
    vectors = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().numpy()
    sizes = np.linalg.norm(model[0].weight.detach().numpy(), axis=1)
    lost, kept = np.argsort(sizes)[:3], np.sort(np.argsort(sizes)[3:])
    wanted = model[2].weight.detach().numpy().copy()
    for p in lost:
        norms = np.linalg.norm(vectors[kept], axis=1) * np.linalg.norm(vectors[p])
        cosine = vectors[kept] @ vectors[p] / norms
        k = kept[cosine.argmax()]
        if cosine.max() >= 0.45:
            ratio = np.linalg.norm(vectors[p]) / np.linalg.norm(vectors[k])
            wanted[:, k] += ratio * model[2].weight.detach().numpy()[:, p]
    after = ran(program, ratio=1 / 3, merge_threshold=0.45).program
    np.testing.assert_allclose(after.state["2.weight"].detach().numpy(), wanted[:, kept])
    assert not np.array_equal(wanted[:, kept], model[2].weight.detach().numpy()[:, kept])


def test_below_the_threshold_nothing_is_merged() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    filters = torch.stack([2 * eye[0], 3 * eye[1], eye[0] + 0.5 * eye[1]]).reshape(3, 2, 1, 1)
    model = Pair(filters)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.norm.running_var.fill_(1.0)
    program = traced(model)
    cosine = 1 / 1.25**0.5  # of the smallest to the first
    columns = program.state["b.weight"][:, :2]
    below = ran(program, ratio=0.34, merge_balance=1.0, merge_threshold=cosine - 0.01)
    above = ran(program, ratio=0.34, merge_balance=1.0, merge_threshold=cosine + 0.01)
    assert not torch.equal(below.program.state["b.weight"], columns)
    assert torch.equal(above.program.state["b.weight"], columns)
    assert "no cosine with a kept filter reaches 0.9" in _told(above)["a"]
    assert (below.metrics["repaired"], above.metrics["repaired"]) == (1.0, 0.0)


def _told(result: Any) -> dict[str, str]:
    return {action.layer: action.what for action in result.actions}


def test_opposite_and_empty_filters_are_not_merged() -> None:
    filters = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    filters[1], filters[3] = -0.1 * filters[0], 0.0
    filters[2] = 5 * torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2)).double()
    program = traced(Pair(filters))
    result = ran(program, ratio=0.5, merge_threshold=0.5)
    columns = program.state["b.weight"][:, [0, 2]]
    assert torch.equal(result.program.state["b.weight"], columns)


@pytest.mark.parametrize(
    ("act", "groups", "reason"),
    [
        (nn.GELU(), 1, "gelu of a multiple is no multiple"),
        (nn.ReLU6(), 1, "of a multiple is no multiple"),
        (None, 6, "a depthwise convolution reads each channel by itself"),
    ],
)
def test_what_cannot_be_merged_is_lost_and_says_why(
    act: nn.Module | None, groups: int, reason: str
) -> None:
    program = traced(with_a_multiple(act=act, groups=groups))
    merged, lost = ran(program, ratio=0.17), ran(program, ratio=0.17, repair="none")
    assert torch.equal(merged.program(X), lost.program(X))
    assert reason in _told(merged)["a"]


def test_leaky_relu_and_no_activation_merge() -> None:
    for act in (nn.LeakyReLU(0.1), nn.Identity()):
        program = traced(with_a_multiple(act=act))
        torch.testing.assert_close(ran(program, ratio=0.17).program(X), program(X))


def test_rounding_is_left_as_it_is() -> None:
    model = with_a_multiple().float()
    program = traced(model, X.float())
    plain = ran(program, ratio=0.0, weight_bits=4, repair="none")
    merged = ran(program, ratio=0.0, weight_bits=4)
    assert torch.equal(plain.program(X.float()), merged.program(X.float()))
    assert "merging repairs no rounding" in _told(merged)["a"]
    both = ran(program, ratio=0.17, weight_bits=8).program
    with torch.no_grad():
        gap = (both(X.float()) - program(X.float())).norm() / program(X.float()).norm()
    assert float(gap) < 0.02


def test_options_that_do_not_belong_together() -> None:
    for name in ("offsets", "shrinkage"):
        with pytest.raises(ArgumentError, match=f"{name} has no part in repair merge"):
            Udfc(repair="merge", **{name: 0.5})
    for name in ("merge_balance", "merge_threshold"):
        with pytest.raises(ArgumentError, match=f"{name} has no part in repair auto"):
            Udfc(**{name: 0.5})
        Udfc(repair="merge", **{name: 0.5})
    with pytest.raises(ArgumentError, match="repair"):
        QuantizeUdfc(repair="merge")
    for one in (Udfc, QuantizeUdfc):
        with pytest.raises(ArgumentError, match="offsets has no part in repair features"):
            one(repair="features", offsets=0.5)
