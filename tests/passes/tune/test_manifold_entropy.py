"""Embeddings that are driven apart: every part of the loss, the buffers, and a covered ring."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import Moment
from graphwright.ir.tune.critic import Critic
from graphwright.passes.tune.manifold_entropy import (
    ManifoldEntropy,
    Spread,
    bounded,
    isometry,
    log,
    mixed,
    nearest,
    pushed,
    risen,
    view,
)

CHAIN = ("generator", [("tune.manifold_entropy", {
    "critic": {"width": 8}, "buffer": 8, "generator_every": 2, "tune": {"steps": 3},
})])  # fmt: skip


# ---- parts of the loss


def test_the_distance_to_the_nearest_is_that_of_brute_force() -> None:
    torch.manual_seed(0)
    f = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    buffer = torch.randn(40, 5, dtype=torch.float64)
    rows = [min(sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) / 5 for other in
                buffer.tolist()) for row in f.tolist()]  # fmt: skip
    found = nearest(f, buffer)
    assert found.item() == pytest.approx(sum(rows) / 7, rel=1e-12)
    assert log(found).item() == pytest.approx(math.log(sum(rows) / 7), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, f)
    index = ((f[:, None] - buffer) ** 2).sum(2).argmin(1)
    torch.testing.assert_close(gradient, (2 * (f - buffer[index]) / 35).detach())


def test_what_the_buffer_has_is_at_no_distance() -> None:
    torch.manual_seed(0)
    f, buffer = torch.randn(3, 4), torch.randn(64, 4)
    assert nearest(f[:1], buffer) > 0.01
    assert nearest(f[:1], torch.cat([buffer[:-1], f[:1]])) == 0
    assert nearest(f, torch.cat([buffer[:-1], f[:1]])) < nearest(f, buffer)
    repeated = log(nearest(f.requires_grad_(), pushed(buffer, f)))
    assert repeated.item() == pytest.approx(math.log(1e-12), rel=1e-6)
    assert torch.isfinite(torch.autograd.grad(repeated, f)[0]).all()


@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_a_buffer_is_a_queue_of_one_length(batch: int) -> None:
    buffer, everything = torch.zeros(8, 2), [torch.zeros(8, 2)]
    for step in range(6):
        f = torch.full((batch, 2), float(step)) + torch.arange(batch)[:, None] / 100
        everything.append(f)
        buffer = pushed(buffer, f)
        assert torch.equal(buffer, torch.cat(everything)[-8:])


def test_a_linear_discriminator_has_isometric_mixes() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 3, dtype=torch.float64)
    a, b = torch.randn(2, 9, 5, dtype=torch.float64)
    share = torch.randn(9, dtype=torch.float64)
    inside, aim = mixed(a, b, share) @ matrix, mixed(a @ matrix, b @ matrix, share)
    assert isometry(inside, aim, 0.0) < 1e-28
    torch.manual_seed(5)
    noise = 0.05 * torch.randn_like(aim)
    torch.manual_seed(5)
    assert float(isometry(aim, aim, 0.05)) == pytest.approx(float(noise.square().mean()), rel=1e-9)
    images = torch.randn(2, 9, 1, 4, 4)
    third = mixed(*images, share.float())[3]
    torch.testing.assert_close(third, share[3].float() * (images[0, 3] - images[1, 3]) +
                               images[1, 3])  # fmt: skip


def test_another_view_is_mirrored_along_a_side() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 6)
    seen = set()
    for _ in range(20):
        found = view(x, flips=True)
        near = [axis for axis in range(4) if (found - x.flip(axis)).abs().max() < 0.01]
        seen.update(near)
        assert len(near) == 1
    assert seen == {2, 3}
    gap = view(x, flips=False) - x
    assert 0.8e-3 < float(gap.std()) < 1.2e-3
    assert float((view(x[:, :, 0, 0], flips=True) - x[:, :, 0, 0]).abs().max()) < 0.01


def test_the_factor_of_entropy_rises() -> None:
    assert [risen(step, 10) for step in (0, 5, 10, 20)] == [0.0, 0.5, 1.0, 1.0]
    assert risen(0, 0) == 1.0


def test_layers_are_bounded() -> None:
    torch.manual_seed(0)
    for critic in (Critic((6,), 8, outputs=3), Critic((1, 8, 8), 8, outputs=3)):
        bounded(critic)
        layers = [m for m in critic.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for _ in range(30):
            critic(torch.randn(2, *((6,) if critic.dims == 0 else (1, 8, 8))))
        for layer in layers:
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1).detach(), 2)
            assert float(norm) == pytest.approx(1.0, abs=0.02)


# ---- whole steps


class Generator(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


@cache
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Generator().eval(), (torch.randn(4, 2),), {"z": {0: "batch"}})


MODES = 2 * torch.stack([(torch.arange(8) * math.pi / 4).cos(),
                         (torch.arange(8) * math.pi / 4).sin()], 1)  # fmt: skip


def ring(count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    modes = MODES[torch.randint(8, (count,), generator=g)]
    return modes + 0.05 * torch.randn(count, 2, generator=g)


def batches(size: int = 64, count: int = 16) -> list[dict[str, Tensor]]:
    return [{"z": torch.zeros(size, 2), "labels": part} for part in ring(size * count).split(size)]


def test_a_step_is_the_loss_of_both_networks() -> None:
    """Against the formulas of the two losses, with the random numbers that were drawn."""
    options = {"critic": {"width": 8}, "buffer": 16, "dlle": 0.7, "disomap": 0.3, "entropy": 0.9,
               "entropy_rise": 0.0, "generator_every": 2}  # fmt: skip
    recipe = Spread(program(), Context(), ManifoldEntropy(**options).options, "test")
    critic, first = recipe.critic.network, recipe.real.clone()
    of_made = recipe.made.clone()
    assert first.abs().max() <= 1
    assert first.shape == of_made.shape == (16, 8)
    made, real = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2)
    for _ in range(50):  # the norms are those of a power iteration, and have to stand still
        critic(made.detach())
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    torch.manual_seed(3)
    f, g = critic(real), critic(made.detach())
    gap = sum((a - critic(b + 1e-3 * torch.randn(6, 2)).detach()).square().mean()
              for a, b in ((f, real), (g, made.detach())))  # fmt: skip
    a = torch.randn(6)[:, None]
    inside = critic(a * real + (1 - a) * made.detach())
    aim = (a * f + (1 - a) * g + 0.05 * torch.randn(6, 8)).detach()
    rows = ((f[:, None] - first) ** 2).mean(2).amin(1)
    loss = g.mean() - f.mean() + 0.7 * gap + 0.3 * (inside - aim).square().mean()
    loss = loss - 0.9 * rows.mean().log()
    wanted = torch.autograd.grad(loss, list(critic.parameters()))
    at = Moment(1, 5, 0, {}, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    torch.manual_seed(3)
    value = recipe.on_loss(at, torch.zeros(()), made, {"z": made, "labels": real})
    assert float(value.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    # the first step of Adam goes lr against the sign of every gradient
    for (name, p), gradient in zip(critic.named_parameters(), wanted, strict=True):
        clear = gradient.abs() > 1e-5 * gradient.abs().max() + 1e-6
        moved = (p.detach() - before[name]) / (2e-4 * 0.9**8)  # the rate fell eight times
        torch.testing.assert_close(moved[clear], -gradient.sign()[clear], rtol=0, atol=0.02)
    torch.testing.assert_close(recipe.real, torch.cat([first[6:], f.detach()]))
    assert torch.equal(recipe.made, of_made), "the generator rests"
    value = recipe.on_loss(Moment(2, 5, 0, {}, at.optimizer), torch.zeros(()), made,
                           {"z": made, "labels": real})  # fmt: skip
    f = critic(made)
    wanted = -f.mean() - 0.9 * ((f[:, None] - of_made) ** 2).mean(2).amin(1).mean().log()
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    (pull, exact) = (torch.autograd.grad(x, made)[0] for x in (value, wanted))
    torch.testing.assert_close(pull, exact, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(recipe.made[-6:], f.detach())


OPTIONS = {
    "generator_every": 1, "critic": {"width": 32, "lr": 2e-3}, "buffer": 256,
    "tune": {"steps": 60, "lr": 2e-3, "betas": (0.5, 0.9), "schedule": "constant"},
}  # fmt: skip


def test_the_entropy_spreads_samples() -> None:
    """Means of the distances between samples, soon after the start from nearly one point."""
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(9))

    def spread(made: gw.Program) -> float:
        x = made(z).detach()
        return float(torch.cdist(x, x).mean())

    found = {
        w: spread(ManifoldEntropy(**OPTIONS, entropy=w)(program(), training=batches(), check=False))
        for w in (0.0, 1.0)
    }
    assert spread(program()) < 0.15
    assert 1.0 < found[1.0] < 4.0, "the ring is 2.5"
    assert found[1.0] > 1.3 * found[0.0]


SPEC = """
version: 1
training: {data: train.npz, batch_size: 32}
passes:
  - tune.manifold_entropy: {critic: {width: 16}, tune: {steps: 20}}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    program().save(tmp_path / "net.pt2")
    real = ring(128).numpy()
    np.savez(tmp_path / "train.npz", z=np.zeros((128, 2), np.float32), labels=real)
    (tmp_path / "spec.yaml").write_text(SPEC)
    found = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert found.report["passes"][0]["metrics"]["last_distance"] > 0
    assert list((tmp_path / "out").rglob("*.onnx"))


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(3, 4), nn.Linear(8, 16)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.layer(torch.cat([z, self.table(label)], 1)).reshape(-1, 1, 4, 4)


def test_images_with_conditions_and_what_cannot_be_right() -> None:
    torch.manual_seed(0)
    args = (torch.randn(4, 4), torch.arange(4) % 3)
    free = {"z": {0: "batch"}, "label": {0: "batch"}}
    net = gw.trace(Conditional().eval(), args, free, ranges={"label": (0, 3)})
    images = torch.randn(4, 1, 4, 4)
    data = [{"z": args[0], "label": args[1], "labels": images}]
    small = {"critic": {"width": 4}, "tune": {"steps": 6}}
    made = ManifoldEntropy(latents=["z"], **small)(net, training=data, check=False)
    assert not torch.equal(made.state["table.weight"], net.state["table.weight"])
    with pytest.raises(ArgumentError, match="Say in `latents` which of them are drawn"):
        ManifoldEntropy(**small)(net, training=data)
    with pytest.raises(ArgumentError, match="no input 'noise'"):
        ManifoldEntropy(latents=["noise"], **small)(net, training=data)
    with pytest.raises(ModelError, match="'label' is int64"):
        ManifoldEntropy(latents=["label"], **small)(net, training=data)
    with pytest.raises(
        ArgumentError, match=r"labels \(batch, 1, 4, 4\) of floating point, and the"
    ):
        ManifoldEntropy(latents=["z"], **small)(net, training=[{**data[0], "labels": args[1]}])
    with pytest.raises(ArgumentError, match="needs real samples"):
        ManifoldEntropy()(program(), training=[{"z": torch.zeros(4, 2)}])
    for options, said in (
        ({"tune": {"accumulate": 2}}, "leave accumulate at 1"),
        ({"tune": {"optimizer": "mfac"}}, "choose another optimizer"),
        ({"entropy_rise": 1.0}, "entropy_rise"),
        ({"outputs": 0}, "outputs"),
    ):
        with pytest.raises(ArgumentError, match=said):
            ManifoldEntropy(**options)
    flat = gw.trace(nn.Flatten(0).eval(), (torch.randn(4, 2),), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match="one sample per row of the input"):
        ManifoldEntropy()(flat, training=batches(8, 1))
