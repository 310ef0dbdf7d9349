from __future__ import annotations

import torch
from models.every_pass import LABELLED, UNTIED
from models.tune_net import fresh, images, table, traced
from torch import nn

import graphwright as gw
from graphwright.ir.tune.losses import cross_entropy

CHAIN = ("text", [("adapt.lora_sb", {"targets": UNTIED, "rank": 2, "gradient": LABELLED})])

STEP = 1e-3


def prepared(**options: object) -> tuple[gw.Program, gw.Program, dict[str, torch.Tensor]]:
    before = traced(fresh(), 4, 1, 4, 4).eval()
    x, labels = images(48)
    data = table(before.signature, x, labels, 16)
    made = gw.passes.adapt.LoraSb(
        targets=["*"], ranks={"conv": 1, "fc": 3}, step=STEP, iterations=None,
        gradient={"steps": 3, "shuffle": False}, **options,
    )  # fmt: skip
    return before, made(before, training=data), {"x": x, "labels": labels}


def full_gradient(before: gw.Program, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The sum over the three batches, in training mode, with the tensors as they are."""
    total = torch.zeros_like(before.state[name])
    for at in range(0, 48, 16):
        program = before.train()
        state = {n: t.detach().clone() for n, t in program.state.items()}
        state[name] = nn.Parameter(state[name])
        part = {n: t[at : at + 16] for n, t in batch.items()}
        out = program.replace(state=state).run_flat((part["x"],))[0]
        (grad,) = torch.autograd.grad(cross_entropy(out, part), state[name])
        total += grad
    return total


def test_it_starts_with_the_best_approximation_of_the_first_full_step() -> None:
    before, after, batch = prepared()
    for layer, rank in (("conv", 1), ("fc", 3)):
        gradient = full_gradient(before, batch, f"{layer}.weight").flatten(1).double()
        step = -STEP * gradient.sign()
        a, core, b = (
            after.state[f"{layer}.{part}.default"].detach().double()
            for part in ("lora_a", "core", "lora_b")
        )
        a, b = a.flatten(1), b.flatten(1)
        left = float((b @ core @ a - step).norm())
        tail = float(torch.linalg.svdvals(step)[rank:].norm())
        assert abs(left - tail) <= 1e-3 * float(step.norm())
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(b.T @ b, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-5)
        # a gradient step on the core is what the full gradient projects to
        assert core.shape == (rank, rank)
    assert set(after.trainable()) == {"conv.core.default", "fc.core.default"}


def test_the_loss_falls_before_anything_is_trained() -> None:
    before, after, batch = prepared()
    losses = [
        float(cross_entropy(p.run_flat((batch["x"],))[0].detach(), batch)) for p in (before, after)
    ]
    assert losses[1] < losses[0]
    assert all(torch.equal(after.state[n], t) for n, t in before.state.items())
