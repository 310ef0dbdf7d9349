from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.adapters import gradients, moved
from models.every_pass import UNTIED
from models.tune_net import fresh, images, table, traced
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.tune import Hook, TuneOptions, tune
from graphwright.passes.adapt.mosa import Experts, apart
from graphwright.passes.training import training_hooks

CHAIN = ("text", [("adapt.mosa", {"targets": UNTIED, "width": 4})])

SMALL: dict[str, Any] = {"targets": ["fc"], "width": 5, "dropout": 0.0, "scale": 0.5}
STEPS = {"steps": 12, "lr": 0.05, "schedule": "constant", "shuffle": False, "weight_decay": 0.1}


def program() -> gw.Program:
    return traced(fresh(), 4, 1, 4, 4)


def part(made: gw.Program, name: str, count: int) -> tuple[torch.Tensor, ...]:
    """The experts' entries, and the mask of each in the shape of the matrix."""
    own = [made.state[f"fc.{name}_{n}.default"].detach().flatten() for n in range(count)]
    places = made.state[f"fc.{name}_places.default"]
    which = torch.cat([torch.full((len(e),), n) for n, e in enumerate(own)])[places]
    return torch.cat(own)[places], which


@pytest.mark.parametrize("split", ["up", "down", "both"])
def test_it_starts_as_the_program_with_the_formula_s_number_of_parameters(split: str) -> None:
    before = program()
    made = gw.passes.adapt.Mosa(**SMALL, split=split, experts=3)(before)
    x = torch.randn(6, 1, 4, 4)
    torch.testing.assert_close(made(x), before(x), rtol=0, atol=1e-6)
    biases = {"up": 3 * 3 + 5, "down": 3 + 3 * 5, "both": 3 * (3 + 5)}[split]
    sizes = {n: p.numel() for n, p in made.trainable().items()}
    assert sum(sizes.values()) == 64 * 5 + 5 * 3 + biases
    for name in ("up", "down") if split == "both" else (split,):
        _, which = part(made, name, 3)
        counts = which.bincount(minlength=3)
        assert int(counts.max() - counts.min()) <= 1
        assert int(counts.sum()) == {"up": 15, "down": 320}[name]
    found = gradients(moved(made), x)
    assert set(found) == set(made.trainable())
    with pytest.raises(ModelError, match="cannot be merged"):
        gw.passes.adapt.Merge()(made)


class Drawn(Hook):
    """Draws with the engine's own numbers, as the experts do, and writes down which were in use."""

    def __init__(self, experts: Experts) -> None:
        self.experts, self.log = experts, []

    def on_parameters(self, at: Any, values: Any) -> Any:
        found = self.experts.on_parameters(at, values)
        if at.is_training:
            self.log.append([
                next(n for n, (_, bias, _) in enumerate(split) if found[bias].requires_grad)
                for split in self.experts.split
            ])  # fmt: skip
        return found

    def also_run(self, at: Any, batch: Any) -> Any:
        return self.experts.also_run(at, batch)

    def on_loss(self, at: Any, loss: Any, outputs: Any, batch: Any) -> Any:
        return self.experts.on_loss(at, loss, outputs, batch)


def test_training_is_that_of_copies_under_masks() -> None:
    """Against four whole copies of both matrices, masked gradients, and AdamW on each: one that
    was not drawn has no gradient, so that its moments and its decay rest."""
    before = program()
    made = gw.passes.adapt.Mosa(**SMALL, split="both")(before)
    x, labels = images(48)
    (hook,) = training_hooks(made)
    drawn = Drawn(hook)
    tuned = tune(made, table(made.signature, x, labels, 8), TuneOptions(**STEPS), gw.Context(),
                 hooks=[drawn])  # fmt: skip
    assert len(drawn.log) == 24
    assert len({tuple(row) for row in drawn.log}) > 6

    entries, masks = {}, {}
    for name, shape in (("down", (5, 64)), ("up", (3, 5))):
        values, which = part(made, name, 4)
        entries[name] = [values.reshape(shape).clone().requires_grad_() for _ in range(4)]
        masks[name] = [(which == n).reshape(shape).float() for n in range(4)]
        entries[f"{name}_bias"] = [torch.zeros(shape[0], requires_grad=True) for _ in range(4)]
    matrices = [*entries["down"], *entries["up"]]
    biases = [*entries["down_bias"], *entries["up_bias"]]
    start = [m.detach().clone() for m in matrices]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}],
        lr=0.05,
    )
    net = fresh().train()
    draws = iter(drawn.log)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        down, up = next(draws)
        with torch.no_grad():
            h = torch.relu(net.norm(net.conv(rows))).flatten(1)
        hidden = F.gelu(F.linear(h, entries["down"][down], entries["down_bias"][down]))
        change = F.linear(hidden, entries["up"][up], entries["up_bias"][up])
        return (net.fc(h) + 0.5 * change).requires_grad_()

    for step in range(12):
        rows = torch.arange(48).split(8)[step % 6]
        optimizer.zero_grad()
        first, second = logits(x[rows]), logits(x[rows])
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        kl = F.kl_div(p, q.detach().exp(), reduction="batchmean")
        kl = kl + F.kl_div(q, p.detach().exp(), reduction="batchmean")
        (F.cross_entropy(first, labels[rows]) + 0.5 * kl).backward()
        for m, mask in zip(matrices, [*masks["down"], *masks["up"]], strict=True):
            if m.grad is not None:
                m.grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():  # the published code decays what is under a mask, too
            for m, mask, first_value in zip(matrices, [*masks["down"], *masks["up"]], start,
                                            strict=True):  # fmt: skip
                m.copy_(torch.where(mask > 0, m, first_value))
    for name, shape in (("down", (5, 64)), ("up", (3, 5))):
        values, _ = part(tuned.program, name, 4)
        wanted = sum(m * mask for m, mask in zip(entries[name], masks[name], strict=True))
        torch.testing.assert_close(values.reshape(shape), wanted.detach(), rtol=1e-4, atol=1e-6)
        for n in range(4):
            bias = tuned.program.state[f"fc.{name}_bias_{n}.default"].detach()
            torch.testing.assert_close(bias, entries[f"{name}_bias"][n].detach(),
                                       rtol=1e-4, atol=1e-6)  # fmt: skip


def test_outside_of_training_it_is_the_mean_of_the_experts(tmp_path: Path) -> None:
    made = moved(gw.passes.adapt.Mosa(**SMALL)(program()))
    x = torch.randn(6, 1, 4, 4)
    net = fresh()
    h = torch.relu(net.norm(net.conv(x))).flatten(1)
    state = {n.removesuffix(".default"): t.detach() for n, t in made.state.items()}
    hidden = F.gelu(F.linear(h, state["fc.down"], state["fc.down_bias"]))
    values, which = part(made, "up", 4)
    each = [F.linear(hidden, (values * (which == n)).reshape(3, 5), state[f"fc.up_bias_{n}"])
            for n in range(4)]  # fmt: skip
    wanted = (net.fc(h) + 0.5 * torch.stack(each).mean(0)).detach()
    torch.testing.assert_close(made(x).detach(), wanted, rtol=1e-5, atol=1e-6)
    made.save(tmp_path / "a.pt2")
    assert torch.equal(gw.load(tmp_path / "a.pt2")(x), made(x))
    for backend in ("onnxruntime", "triton"):
        found = gw.lower(made, backend)(x)
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)
    low = gw.passes.quantize.Nf4(block=16, targets=["fc"])(made)
    torch.testing.assert_close(low(x).detach(), wanted, rtol=0.2, atol=0.2)
    over = gw.passes.adapt.Mosa(**SMALL)(
        gw.passes.quantize.Nf4(block=16, targets=["fc"])(program())
    )
    assert all(float(g.abs().max()) > 0 for g in gradients(moved(over), x).values())


def test_two_passes_of_a_step_have_other_experts_and_agree_the_more_for_the_penalty() -> None:
    x, labels = images(48)
    gap = {}
    for weight in (0.0, 20.0):
        made = moved(gw.passes.adapt.Mosa(**SMALL, consistency=weight)(program()))
        tune_ = {"epochs": 10, "lr": 0.02, "schedule": "constant"}
        data = table(made.signature, x, labels, 16)
        trained = gw.passes.tune.Finetune(tune=tune_, targets=["fc"])(made, training=data)
        (hook,) = training_hooks(trained)
        at = type("At", (), {"is_training": True})()
        torch.manual_seed(0)
        logits = []
        for _ in range(8):
            values = hook.on_parameters(at, trained.trainable())
            logits.append(trained.replace(state={**trained.state, **values})(x).detach())
        gap[weight] = sum(float(apart(a, b)) for a in logits for b in logits)
    assert gap[20.0] < 0.5 * gap[0.0]


def test_the_divergence_is_symmetric_and_its_targets_rest() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    wanted = 0.5 * ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean()
    torch.testing.assert_close(apart(a, b), wanted)
    torch.testing.assert_close(apart(a, b), apart(b, a))
    (found,) = torch.autograd.grad(apart(a, b), a)
    torch.testing.assert_close(found, 0.5 * (p - q) / 4)  # of KL(q || p) alone


def test_a_layer_of_a_table_is_no_matrix() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    made = gw.trace(net.eval(), (torch.zeros(2, 3, dtype=torch.long),))
    with pytest.raises(ModelError, match="select no layer of kind"):
        gw.passes.adapt.Mosa(targets=["*"])(made)
