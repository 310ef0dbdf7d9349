from __future__ import annotations

import pytest
import torch
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = ("text", [("adapt.loldu", {"targets": UNTIED, "rank": 2})])


def net(out: int, columns: int) -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(nn.Sequential(nn.Linear(columns, out)).eval(), (torch.randn(4, columns),))


@pytest.mark.parametrize("shape", [(9, 9), (7, 12), (12, 7)])
def test_a_step_is_diagonal_between_the_weights_own_triangles(shape: tuple[int, int]) -> None:
    before = net(*shape)
    weight = before.state["0.weight"].detach().double()
    after = gw.passes.adapt.Loldu(rank=5, alpha=2.0)(before)
    assert sum(p.numel() for p in after.trainable().values()) == 5
    moved = dict(after.state)
    torch.manual_seed(1)
    step = torch.randn(5)
    moved["0.pivots.default"] = nn.Parameter(after.state["0.pivots.default"].detach() + step)
    merged = gw.passes.adapt.Merge()(after.replace(state=moved))
    change = merged.state["0.weight"].detach().double() - weight
    permutation, lower, upper = torch.linalg.lu(weight)
    pivots = upper.diagonal()
    unit = upper / pivots[:, None]
    inner = torch.linalg.pinv(lower) @ permutation.T @ change @ torch.linalg.pinv(unit)
    wanted = torch.zeros(len(pivots), dtype=torch.float64)
    wanted[:5] = 2.0 / 5 * step.double()
    torch.testing.assert_close(inner, torch.diag(wanted), rtol=1e-4, atol=1e-4)


def test_a_weight_of_lower_rank_is_refused_by_name() -> None:
    before = net(6, 6)
    flat = dict(before.state)
    flat["0.weight"] = nn.Parameter(torch.ones(6, 6))
    with pytest.raises(ModelError, match="pivots of '0'"):
        gw.passes.adapt.Loldu(rank=3)(before.replace(state=flat))
