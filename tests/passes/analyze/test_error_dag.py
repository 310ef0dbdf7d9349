"""The graph of errors: CoLiDE against its formulas, known graphs, networks with known errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.passes.analyze import error_dag
from graphwright.passes.analyze._math import colide

CHAIN = ("conv", [("analyze.error_dag", {"trials": 8})])

ErrorDag = gw.passes.analyze.ErrorDag


def sem(d: int, edges: int, n: int, seed: int, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a random DAG in the order of its variables, and n observations."""
    g = np.random.default_rng(seed)
    places = [(i, j) for i in range(d) for j in range(i + 1, d)]
    w = np.zeros((d, d))
    for k in g.choice(len(places), edges, replace=False):
        w[places[k]] = g.uniform(0.6, 1.5) * g.choice([-1, 1])
    z = g.normal(size=(n, d)) * noise
    return w, z @ np.linalg.inv(np.eye(d) - w)


@pytest.mark.parametrize("variance", ["equal", "own"])
def test_scales_and_gradients_are_those_of_the_score(variance: colide.Variance) -> None:
    g = np.random.default_rng(0)
    c = colide.covariance(g.normal(size=(50, 5)) @ g.normal(size=(5, 5)))
    w = 0.3 * g.normal(size=(5, 5))
    sigma = colide.scales(c, w, variance)
    best = colide.score(c, w, sigma, 0.1)
    for factor in (0.99, 1.01):  # no other scales of that kind are better
        assert colide.score(c, w, factor * sigma, 0.1) > best
    for j in range(5 if variance == "own" else 0):
        other = sigma.copy()
        other[j] *= 1.01
        assert colide.score(c, w, other, 0.1) > best
    found = colide.score_gradient(c, w, sigma, 0.1)
    slope = colide.acyclicity(w, 2.0)[1]
    for i in range(5):
        for j in range(5):
            step = np.zeros((5, 5))
            step[i, j] = 1e-6
            by_score = [colide.score(c, w + k * step, sigma, 0.1) for k in (1, -1)]
            by_h = [colide.acyclicity(w + k * step, 2.0)[0] for k in (1, -1)]
            assert abs((by_score[0] - by_score[1]) / 2e-6 - found[i, j]) < 1e-5
            assert abs((by_h[0] - by_h[1]) / 2e-6 - slope[i, j]) < 1e-5


def test_only_graphs_without_cycles_have_no_penalty() -> None:
    w, _ = sem(6, 8, 2, 1, np.ones(6))
    assert abs(colide.acyclicity(0.5 * w, 1.0)[0]) < 1e-12
    assert not colide.has_cycle(w)
    i, j = np.argwhere(w)[0]
    w[j, i] = 0.5
    assert colide.acyclicity(0.5 * w, 1.0)[0] > 0.01
    assert colide.has_cycle(w)


@pytest.mark.parametrize("variance", ["equal", "own"])
def test_the_concomitant_lasso_is_at_its_minimum(variance: colide.Variance) -> None:
    """The smooth part's gradient: at most lambda at zeros, -lambda sign(w) elsewhere."""
    _, x = sem(7, 9, 400, 2, np.linspace(0.5, 2, 7))
    c, support = colide.covariance(x), np.triu(np.ones((7, 7), bool), 1)
    w, sigma = colide.restricted(c, support, 0.05, variance)
    smooth = colide.score_gradient(c, w, sigma, 0.0)
    assert not w[~support].any()
    used = w != 0
    np.testing.assert_allclose(smooth[used], -0.05 * np.sign(w[used]), atol=1e-6)
    assert np.abs(smooth[support & ~used]).max() <= 0.05 + 1e-6
    np.testing.assert_allclose(sigma, colide.scales(c, w, variance))


def test_it_finds_a_known_graph_with_the_order_given() -> None:
    noise = np.sqrt(np.random.default_rng(0).uniform(0.5, 3, 10))
    true, x = sem(10, 20, 1000, 0, noise)
    support = np.triu(np.ones((10, 10), bool), 1)
    w, sigma = colide.restricted(colide.covariance(x), support, 0.05, "own")
    assert ((np.abs(w) > 0.3) == (true != 0)).all()
    np.testing.assert_allclose(sigma, noise, rtol=0.1)
    effects = colide.total_effects(w)
    np.testing.assert_allclose(effects, sum(np.linalg.matrix_power(w, k) for k in range(10)))


def test_it_finds_a_known_graph_and_its_order() -> None:
    noise = np.sqrt(np.random.default_rng(5).uniform(0.5, 3, 6))
    true, x = sem(6, 8, 1000, 5, noise)
    w, sigma = colide.free(colide.covariance(x), 0.05, "own", steps=(1500, 4000), lr=1e-3)
    assert ((w != 0) == (true != 0)).all()
    assert not colide.has_cycle(w)
    np.testing.assert_allclose(sigma, noise, atol=0.15)


def test_a_penalty_fits_noise_of_any_size_better_than_a_plain_lasso() -> None:
    """Noise of a fifth: the lasso's penalty, right at 1, drowns the edges; the score's does not."""
    true, x = sem(8, 12, 1000, 3, np.full(8, 0.2))
    c, support = colide.covariance(x), np.triu(np.ones((8, 8), bool), 1)
    w, _ = colide.restricted(c, support, 0.05, "equal")
    plain = np.zeros_like(c)
    for _ in range(500):
        for j in range(8):
            colide._descend(c, plain, j, np.flatnonzero(support[:, j]), 0.05)
    assert np.abs(w - true).sum() < 0.7 * np.abs(plain - true).sum()


# ---- networks


class Branches(nn.Module):
    """Two branches into one sum: neither sees the other's error, and one is ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loud, self.quiet = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.head = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        return self.head(self.loud(h) + 0.02 * self.quiet(h))


def branches() -> tuple[gw.Program, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    program = gw.trace(Branches().eval(), (torch.randn(64, 16),), {"x": {0: "batch"}})
    return program, [{"x": torch.randn(64, 16)}]


def test_edges_run_only_where_the_graph_has_a_way() -> None:
    program, batches = branches()
    chosen = layers(program)
    names = [layer.name for layer in chosen]
    found = error_dag.reachable(program, chosen)
    at = {name: index for index, name in enumerate([*names, "output"])}
    assert found[at["stem"], at["loud"]]
    assert found[at["stem"], at["head"]]
    assert not found[at["loud"], at["quiet"]]
    assert not found[at["quiet"], at["loud"]]
    assert found[:-1, -1].all()
    assert not np.tril(found).any()
    result = ErrorDag(trials=48).execute(program, Context(calibration=batches))
    said = {a.layer: a for a in result.actions}
    assert "quiet" not in said["loud"].reason
    assert "loud" not in said["quiet"].reason
    assert "stem" in said["loud"].reason
    assert not any(a.changed for a in result.actions)


def test_a_layer_of_another_output_has_no_part_in_the_main_one() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side, self.head = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.stem(x).relu()
            return self.head(h), self.side(h)

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = gw.trace(TwoOutputs().eval(), (x,))
    chosen = layers(program)
    place = [layer.name for layer in chosen].index("side")
    assert error_dag.reachable(program, chosen)[:-1, -1].sum() == 2
    assert not error_dag.reachable(program, chosen)[place, -1]
    made = ErrorDag(trials=16)(program, calibration=[{"x": x}])
    assert made.facts["analyze.error_dag"]["influence"]["side"] == 0.0


def test_influences_are_the_layers_shares_of_the_error() -> None:
    """The error of a sum of independent ones: the share of each, averaged over the trials."""
    program, batches = branches()
    made = ErrorDag(trials=120, penalty=0.01)(program, calibration=batches)
    fact = made.facts["analyze.error_dag"]
    influence, bits = fact["influence"], fact["bits"]
    x = batches[0]["x"]
    wanted = program(x).detach()
    alone = {}
    for layer in layers(program):
        weight = program.state[layer.weight].detach()
        g = torch.Generator().manual_seed(0)
        noise = float(weight.abs().max()) * (torch.rand(weight.shape, generator=g) - 0.5) / 16
        state = {**program.state, layer.weight: weight + noise}
        alone[layer.name] = float((program.replace(state=state)(x).detach() - wanted).norm())
    order = sorted(alone, key=alone.__getitem__)
    assert order[0] == "quiet"
    assert min(influence, key=influence.__getitem__) == "quiet"
    assert influence["quiet"] < 0.1
    assert 0.7 < sum(influence.values()) < 1.3  # logarithms of a sum: elasticities sum to 1
    assert bits["quiet"] == min(bits.values()) < max(bits.values())


def test_bits_are_allocated_by_the_influences() -> None:
    program, batches = branches()
    noted = ErrorDag(trials=48)(program, calibration=batches)
    allocation = gw.passes.quantize.BitAllocation(
        quantizer="quantize.rtn", bits=[8, 3], budget=(3 * 8 * 256 + 3 * 128 + 0) / (32 * 896),
        sensitivity="error_dag", options={"block": 16},
    )  # fmt: skip
    result = allocation.execute(noted, Context(calibration=batches))
    widths = {a.layer: a.what for a in result.actions}
    assert widths["quiet"] == "3 bits"
    assert widths["loud"] == widths["stem"] == "8 bits"
    with pytest.raises(ArgumentError, match=r"Put analyze.error_dag"):
        allocation(program, calibration=batches)


def test_the_order_of_execution_is_found_again() -> None:
    g = np.random.default_rng(0)
    x = g.normal(size=(400, 3))
    x[:, 1] += 1.0 * x[:, 0]
    x[:, 2] += 1.0 * x[:, 1]
    support = np.triu(np.ones((3, 3), bool), 1)
    c = colide.covariance(x)
    w, _ = colide.free(c, 0.05, "own", steps=(800, 1500), lr=1e-3)
    assert ((w != 0) <= support).all()


def test_refusals() -> None:
    program, batches = branches()
    with pytest.raises(ModelError, match="1 chosen layers have float weights"):
        ErrorDag(targets=["head"])(program, calibration=batches)
    with pytest.raises(ArgumentError, match="is 0 on the first calibration batch"):
        ErrorDag()(program, calibration=[{"x": torch.zeros(4, 16)}])
    with pytest.raises(ArgumentError, match="trials"):
        ErrorDag(trials=4)
