"""Channels and states of a selective scan: cut equals masked, group by group and together."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.ops.selective_scan import selective_scan


class Ssm(nn.Module):
    """A gated scan whose rates are stored as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate = nn.Linear(5, 6), nn.Linear(5, 6)
        self.step = nn.Linear(6, 6)
        self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4)
        self.a = nn.Parameter(-torch.rand(6, 4) - 0.1)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.silu(self.into(tokens))
        y = selective_scan(x, F.softplus(self.step(x)), self.a, self.b(x), self.c(x))
        return self.out(y * F.silu(self.gate(tokens)))


def test_cut_equals_masked() -> None:
    torch.manual_seed(0)
    model = Ssm().double().eval()
    tokens = torch.randn(2, 7, 5, dtype=torch.float64)
    program = gw.trace(model, (tokens,), "batch")
    free = [group for group in gw.channel_groups(program) if group.prunable]
    assert sorted(group.units for group in free) == [4, 6]  # states, and channels
    for chosen in ([free[0]], [free[1]], free):
        picks = {g: list(range(0, g.units, 2)) for g in chosen}
        masked, smaller = gw.zero(program, picks), gw.cut(program, picks)
        with torch.no_grad():
            wanted, found = masked(tokens), smaller(tokens)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
        assert (wanted - program(tokens)).norm() > 1e-3 * wanted.norm()
    smaller = gw.cut(program, {g: [0, 2] for g in free})
    assert smaller.state["a"].shape == (4, 2)
