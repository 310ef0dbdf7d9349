from __future__ import annotations

import itertools

import torch
from models.adapters import moved
from models.every_pass import UNTIED
from models.tune_net import fresh, images, table, traced

import graphwright as gw
from graphwright.passes.adapt.pego import penalty

CHAIN = ("text", [("adapt.pego", {"targets": UNTIED, "rank": 2})])


def test_the_penalty_is_the_sum_over_products_that_are_never_formed() -> None:
    torch.manual_seed(0)
    weight, a, b = (torch.randn(s, dtype=torch.float64) for s in ((9, 7), (6, 7), (9, 6)))
    weight, a, b = (t.requires_grad_() for t in (weight, a, b))
    changes = [b[:, i : i + 2] @ a[i : i + 2] for i in (0, 2, 4)]
    wanted = sum((weight @ c.T).abs().sum() for c in changes)
    wanted = wanted + sum((p @ q.T).abs().sum() for p, q in itertools.combinations(changes, 2))
    found = penalty(weight, a, b, 3)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, (a, b)),
                          torch.autograd.grad(wanted, (a, b)), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)
    assert float(penalty(weight, a, torch.zeros_like(b), 3).detach()) == 0


def test_training_with_it_keeps_the_changes_apart() -> None:
    before = traced(fresh(), 4, 1, 4, 4)
    x, labels = images(48)
    data = table(before.signature, x, labels, 16)
    sizes = {}
    for weight in (0.0, 0.1):
        made = gw.passes.adapt.Pego(targets=["fc"], rank=1, count=3, weight=weight)(before)
        tune = {"epochs": 20, "lr": 0.03, "schedule": "constant"}
        trained = gw.passes.tune.Finetune(tune=tune)(moved(made, size=0.1), training=data)
        a, b = (trained.state[f"fc.lora_{part}.default"].detach() for part in "ab")
        sizes[weight] = float(penalty(trained.state["fc.weight"].detach(), a, b, 3))
        assert torch.equal(trained.state["fc.weight"], before.state["fc.weight"])
    assert sizes[0.1] < 0.5 * sizes[0.0]
