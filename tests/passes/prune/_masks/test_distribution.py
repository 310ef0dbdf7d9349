"""ERK, LAMP and OWL by their formulas, and in the passes that share them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models.masked_nets import images, mixed
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune import Magnitude, Sparsegpt, Wanda
from graphwright.passes.prune._masks.distribution import block_of, erk, lamp, lamp_scores, owl
from graphwright.passes.prune._masks.patterns import Pattern

LAYERS = ("conv", "grouped", "fc1", "fc2")


def zeros(program: Any) -> dict[str, float]:
    return {n: float((program.state[f"{n}.weight"] == 0).float().mean()) for n in LAYERS}


def share(program: Any) -> float:
    every = torch.cat([program.state[f"{n}.weight"].flatten() for n in LAYERS])
    return float((every == 0).float().mean())


def test_erk_by_hand() -> None:
    """8x4x3x3 (23 by 288), 6x24 (30 by 144), 2x2 (4 by 4): the last would be denser than dense."""
    shapes = [(8, 4, 3, 3), (6, 24), (2, 2)]
    found = erk(shapes, 0.3)
    # sum(shape) = 18, 30, 4; the last is full, the first two share 0.3 * 436 - 4
    factor = (0.3 * 436 - 4) / (18 + 30)
    assert found == pytest.approx([18 / 288 * factor, 30 / 144 * factor, 1.0])
    sizes = np.array([288, 144, 4])
    assert float((sizes * found).sum()) == pytest.approx(0.3 * sizes.sum())


def test_lamp_scores_are_the_loops() -> None:
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    flat = sorted(float(v) ** 2 for v in w.flatten().double())
    expected = [value / sum(flat[i:]) for i, value in enumerate(flat)]
    np.testing.assert_allclose(lamp_scores(w), expected, rtol=1e-5)
    parts = [lamp_scores(w), lamp_scores(2 * w[:2]), lamp_scores(w + 3)]
    found = lamp(parts, Pattern(0.5))
    kept = [round(d * len(p)) for d, p in zip(found, parts, strict=True)]
    assert sum(kept) == 40 - 20
    assert lamp([lamp_scores(w), lamp_scores(7 * w)], Pattern(0.4)) == pytest.approx([0.6, 0.6])


def test_owl_is_its_code() -> None:
    """all_layer_ratio of the paper's code, for layers of one size; then weighted."""
    ratios, density, spread = np.array([0.5, 2.0, 1.25]), 0.3, 0.08
    raised = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    expected = raised - raised.mean() + density
    np.testing.assert_allclose(owl(ratios.tolist(), [7, 7, 7], density, spread), expected)
    weighted = np.array(owl(ratios.tolist(), [1, 2, 5], density, spread))
    assert float((weighted * [1, 2, 5]).sum()) == pytest.approx(density * 8)
    assert owl([1.0, 1.0], [3, 4], 0.4, 0.08) == [0.4, 0.4]


def test_layers_of_a_block_are_told_by_the_first_number() -> None:
    assert block_of("model.layers.3.mlp.up") == "model.layers.3"
    assert block_of("lm_head") == "lm_head"


@pytest.mark.parametrize("distribution", ["erk", "lamp", "owl"])
@pytest.mark.parametrize("kind", [Magnitude, Wanda, Sparsegpt])
def test_the_share_is_met_and_layers_differ(kind: type, distribution: str) -> None:
    more = {"outliers": 2.0} if distribution == "owl" else {}  # a tiny net has no larger ones
    step = kind(sparsity=0.6, distribution=distribution, **more)
    result = step.execute(mixed(), Context(calibration=images()))
    assert share(result.program) == pytest.approx(0.6, abs=0.03)  # rows round down
    found = zeros(result.program)
    assert max(found.values()) - min(found.values()) > 0.02
    if distribution == "owl":
        assert all(abs(value - 0.6) <= 2 * 0.08 + 0.05 for value in found.values())


def test_lamp_under_magnitude_is_one_comparison() -> None:
    """The weights with the lowest scores over all layers go, and no other."""
    dense = mixed()
    scores = {n: lamp_scores(dense.state[f"{n}.weight"].detach()) for n in LAYERS}
    every = torch.cat(list(scores.values()))
    limit = every.kthvalue(Pattern(0.6).count(len(every))).values
    pruned = Magnitude(sparsity=0.6, distribution="lamp")(dense)
    for name in LAYERS:
        gone = int((scores[name] <= limit).sum())
        assert int((pruned.state[f"{name}.weight"] == 0).sum()) == pytest.approx(gone, abs=1)


def test_owl_spares_the_layer_with_outliers() -> None:
    """Two equal layers, one of which reads a feature that is twenty times as large."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.outlier = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.plain(x) + self.outlier(y)

    torch.manual_seed(0)
    data = []
    for _ in range(2):
        x, y = torch.randn(16, 32), torch.randn(16, 32)
        y[:, 3] *= 20
        data.append((x, y))
    program = gw.trace(Two().eval(), data[0])
    step = Wanda(sparsity=0.5, distribution="owl", spread=0.2)
    pruned = step(program, calibration=data, check=False)
    plain, outlier = (float((pruned.state[f"{n}.weight"] == 0).float().mean())
                      for n in ("plain", "outlier"))  # fmt: skip
    assert plain == pytest.approx(0.7, abs=0.04)
    assert outlier == pytest.approx(0.3, abs=0.04)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="one sparsity in every layer"):
        Wanda(pattern="2:4", distribution="erk")
    with pytest.raises(ArgumentError, match="spread has no part in distribution erk"):
        Wanda(distribution="erk", spread=0.1)
    with pytest.raises(ArgumentError, match="leave out distribution lamp"):
        Magnitude(scope="global", distribution="lamp")
    with pytest.raises(ArgumentError, match="needs calibration data"):
        Magnitude(distribution="owl")(mixed())


class Lm(nn.Module):
    """A table, a layer, and a head of as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(16, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.fc(self.embed(ids)))).float()


def test_the_head_of_a_language_model_stays_dense_unless_named() -> None:
    """Every matrix here has as many rows as the table: the last one is the head."""
    torch.manual_seed(0)
    program = gw.trace(Lm().eval(), (torch.randint(0, 16, (2, 5)),))
    result = Magnitude().execute(program, Context())
    said = {a.layer: a for a in result.actions}
    assert said["lm_head"].what == "left alone"
    assert "name it in targets" in said["lm_head"].reason
    assert not bool((result.program.state["lm_head.weight"] == 0).any())
    assert said["fc"].what == "50.0% zeros"
    named = Magnitude(targets=["*", "lm_head"]).execute(program, Context())
    assert {a.layer for a in named.actions if a.changed} == {"fc", "lm_head"}
    kinds = Magnitude(targets=["kind:linear"]).execute(program, Context())
    assert {a.layer for a in kinds.actions if a.changed} == {"fc"}
