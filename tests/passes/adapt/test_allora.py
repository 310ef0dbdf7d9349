from __future__ import annotations

import torch
from models.every_pass import UNTIED
from models.tune_net import fresh, images, table, traced
from torch import nn

import graphwright as gw
from graphwright.ir.adapters.record import adapters
from graphwright.passes.adapt.allora import Allora, row_factors, row_scaled

CHAIN = ("text", [("adapt.allora", {"targets": UNTIED, "rank": 2})])


def test_the_factor_is_that_of_the_rows_of_a_product_never_formed() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), torch.randn(5, 3)
    wanted = 1 / ((b @ a).norm(dim=1) + 1 / 2.5**2).sqrt()
    torch.testing.assert_close(row_factors(a, b, 2.5), wanted)
    at_zero = row_factors(a, torch.zeros(5, 3), 2.5)
    torch.testing.assert_close(at_zero, torch.full((5,), 2.5))


def test_gradients_are_scaled_row_by_row_but_not_the_inputs() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 8), (3, 8), (5, 3)))
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    up = torch.randn(2, 4, 5, dtype=torch.float64)
    grads = torch.autograd.grad(row_scaled(x, a, b, 2.5), (x, a, b), up)
    plain_x, _, plain_b = torch.autograd.grad(x @ a.T @ b.T, (x, a, b), up)
    c = 1 / ((b @ a).norm(dim=1) + 1 / 2.5**2).sqrt()
    torch.testing.assert_close(grads[0], plain_x)
    torch.testing.assert_close(grads[2], c[:, None] * plain_b, rtol=1e-5, atol=1e-6)
    of_change = torch.einsum("bto,bti->oi", up, x)
    torch.testing.assert_close(grads[1], (c[:, None] * b).T @ of_change, rtol=1e-5, atol=1e-6)


def test_training_takes_the_scaled_step_and_inference_is_plain() -> None:
    before = traced(fresh(), 4, 1, 4, 4)
    x, labels = images(16)
    data = table(before.signature, x, labels, 16)
    steps = {}
    for name, made in (
        ("plain", gw.passes.adapt.Lora(targets=["fc"], rank=2, alpha=2.0)),
        ("scaled", gw.passes.adapt.Allora(targets=["fc"], rank=2, eta=3.0)),
    ):
        start = made(before)
        state = {**start.state, "fc.lora_a.default": nn.Parameter(torch.ones(2, 64) / 8)}
        tune = {"steps": 1, "optimizer": "sgd", "lr": 0.1, "schedule": "constant"}
        after = gw.passes.tune.Finetune(tune=tune)(start.replace(state=state), training=data)
        steps[name] = after.state["fc.lora_b.default"].detach()
        assert torch.equal(after.state["fc.lora_a.default"], state["fc.lora_a.default"])
    torch.testing.assert_close(steps["scaled"], 3.0 * steps["plain"], rtol=1e-4, atol=1e-6)
    assert float(steps["plain"].abs().max()) > 0
    assert adapters(Allora(targets=["fc"], rank=2)(before))["default"].kind == "adapt.allora"
