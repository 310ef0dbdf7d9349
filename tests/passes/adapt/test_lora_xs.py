from __future__ import annotations

import torch
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw

CHAIN = ("text", [("adapt.lora_xs", {"targets": UNTIED, "rank": 2})])


def test_the_factors_are_the_weights_own_and_the_core_is_all_that_is_trained() -> None:
    torch.manual_seed(0)
    program = gw.trace(nn.Sequential(nn.Linear(20, 14)).eval(), (torch.randn(4, 20),))
    after = gw.passes.adapt.LoraXs(rank=4, iterations=None)(program)
    assert {n: tuple(p.shape) for n, p in after.trainable().items()} == {"0.core.default": (4, 4)}
    u, s, vh = torch.linalg.svd(program.state["0.weight"].detach().double(), full_matrices=False)
    a, b = (after.state[f"0.lora_{x}.default"].double() for x in "ab")
    best = (u[:, :4] * s[:4]) @ vh[:4]
    torch.testing.assert_close(b @ a, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.diag(s[:4] ** 2), rtol=1e-4, atol=1e-5)
    spread = float(after.state["0.core.default"].detach().std())
    assert 3e-6 < spread < 3e-5
