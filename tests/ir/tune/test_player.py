"""A second network in turns with the program: against a plain loop, and through a kill."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.signature import TensorSpec
from graphwright.ir.tune import Moment, TuneOptions, tune
from graphwright.ir.tune.adversarial import critic_loss, generator_loss, r1_penalty
from graphwright.ir.tune.critic import Critic
from graphwright.ir.tune.player import InTurns, Player, PlayerOptions, drawn_from

OPTIONS = TuneOptions(
    steps=6, lr=0.02, optimizer="adam", schedule="linear", shuffle=False, loss="mse"
)
PLAYING = PlayerOptions(lr=0.05, betas=(0.5, 0.9))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def judge() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(16, 3, generator=g), torch.randn(16, 2, generator=g) + 2)
            for _ in range(6)]  # fmt: skip


class Gan(InTurns):
    """The least adversarial recipe: labels are real samples, inputs are noise."""

    def __init__(self, every: int = 1, interrupted: int | None = None) -> None:
        super().__init__(every)
        self.player = Player(judge(), PLAYING, OPTIONS, torch.device("cpu"))
        self.interrupted, self.values = interrupted, []

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Any) -> Tensor:
        if at.step == self.interrupted:
            raise KeyboardInterrupt
        critic = self.player.network
        value = critic_loss(critic(batch["labels"]), critic(outputs.detach()))
        self.values.append(float(self.player.learn(at, value)))
        if self.is_at_rest(at):
            return self.resting(value, outputs)
        with self.player.fixed() as network:
            return generator_loss(network(outputs))

    def state_dict(self) -> dict[str, Any]:
        return {"player": self.player.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.player.load_state_dict(state["player"])


def trained(hook: Gan, **context: Any) -> gw.Program:
    program = gw.trace(net().eval(), {"input": torch.randn(16, 3)})
    return tune(program, batches(), OPTIONS, Context(**context), hooks=[hook]).program


def plain_loop(every: int) -> tuple[nn.Module, nn.Module]:
    """The same, as it would be written without the engine."""
    made, critic = net(), judge()
    g = torch.optim.Adam(made.parameters(), lr=OPTIONS.lr)
    d = torch.optim.Adam(critic.parameters(), lr=PLAYING.lr, betas=PLAYING.betas)
    for step, (x, real) in enumerate(batches()):
        for optimizer, lr in ((g, OPTIONS.lr), (d, PLAYING.lr)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / 6)
        fake = made(x)
        loss = -F.logsigmoid(critic(real)).mean() - F.logsigmoid(-critic(fake.detach())).mean()
        d.zero_grad(), loss.backward(), d.step()
        if step % every == 0:
            g.zero_grad(), (-F.logsigmoid(critic(fake)).mean()).backward(), g.step()
    return made, critic


@pytest.mark.parametrize("every", [1, 3])
def test_turns_are_those_of_a_plain_loop(every: int) -> None:
    hook = Gan(every)
    program = trained(hook)
    made, critic = plain_loop(every)
    for name, tensor in made.named_parameters():
        torch.testing.assert_close(program.state[name].detach(), tensor.detach())
        assert (tensor - dict(net().named_parameters())[name]).abs().max() > 1e-3
    for name, tensor in critic.named_parameters():
        torch.testing.assert_close(hook.player.network.state_dict()[name], tensor.detach())


def test_a_killed_game_goes_on(tmp_path: Any) -> None:
    straight = Gan(2)
    expected = trained(straight)
    work = {"work": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        trained(Gan(2, interrupted=3), **work)
    resumed = Gan(2)
    found = trained(resumed, **work)
    assert resumed.values == straight.values[3:]
    for name, tensor in expected.state.items():
        assert torch.equal(found.state[name], tensor)
    for name, tensor in straight.player.network.state_dict().items():
        assert torch.equal(resumed.player.network.state_dict()[name], tensor)


def test_neither_network_gets_the_gradient_of_the_other() -> None:
    made, player = net(), Player(judge(), PLAYING, OPTIONS, torch.device("cpu"))
    at = Moment(0, 6, 0, {}, torch.optim.SGD(made.parameters(), lr=1.0))
    before = copy.deepcopy(player.network.state_dict())
    fake = made(torch.randn(4, 3))
    player.learn(at, critic_loss(player.network(torch.randn(4, 2)), player.network(fake)))
    assert all(p.grad is None for p in made.parameters())
    assert any(not torch.equal(t, before[n]) for n, t in player.network.state_dict().items())
    with player.fixed() as network:
        loss = generator_loss(network(made(torch.randn(4, 3))))
    loss.backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is None and p.requires_grad for p in player.network.parameters())


def test_the_least_critic_loss_is_at_the_ratio_of_densities() -> None:
    """Of a discrete distribution; the loss is convex in the logits, so it has no other least."""
    real, fake = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1])
    logits = torch.tensor([3.0, 1 / 3], dtype=torch.float64).log().requires_grad_()
    (slope,) = torch.autograd.grad(critic_loss(logits[real], logits[fake]), logits)
    torch.testing.assert_close(slope, torch.zeros(2, dtype=torch.float64))
    (slope,) = torch.autograd.grad(critic_loss(logits[fake], logits[real]), logits)
    assert slope.abs().min() > 0.1, "it tells real from fake"


def test_the_penalty_is_the_squared_gradient() -> None:
    weight = torch.randn(5, dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    found = r1_penalty((x.square() @ weight), x)
    torch.testing.assert_close(found, (2 * x * weight).square().sum(1).mean())


@pytest.mark.parametrize("shape", [(3,), (2, 9), (1, 8, 8), (3, 16, 12), (1, 4, 4, 4)])
def test_a_critic_judges_every_sample_alone_by_all_that_it_is_told(shape: tuple[int, ...]) -> None:
    label = TensorSpec("label", "int64", ("batch",), (0, 5))
    text = TensorSpec("text", "float32", ("batch", 2, 3))
    with drawn_from(torch.Generator().manual_seed(3)):
        critic = Critic(shape, 8, 2, [label, text])
    x, levels = torch.randn(4, *shape), torch.rand(4, 2)
    told = {"label": torch.tensor([0, 1, 4, 2]), "text": torch.randn(4, 2, 3)}
    whole = critic(x, levels, told).detach()
    assert whole.shape == (4,)
    alone = [critic(x[i : i + 1], levels[i : i + 1], {n: t[i : i + 1] for n, t in told.items()})
             for i in range(4)]  # fmt: skip
    torch.testing.assert_close(torch.cat(alone).detach(), whole, rtol=1e-4, atol=1e-5)
    others = [
        critic(x.flip(0), levels, told),
        critic(x, levels.flip(0), told),
        *(critic(x, levels, {**told, n: t.flip(0)}) for n, t in told.items()),
    ]
    assert all(float((other.detach() - whole).abs().min()) > 1e-6 for other in others)
    with drawn_from(torch.Generator().manual_seed(3)):
        again = Critic(shape, 8, 2, [label, text])
    assert torch.equal(again(x, levels, told), whole)


def test_what_no_critic_reads_is_refused() -> None:
    with pytest.raises(ModelError, match="vectors, sequences, images or volumes"):
        Critic((1, 2, 3, 4, 5))
    with pytest.raises(ModelError, match="has the range None"):
        Critic((3,), conditions=[TensorSpec("label", "int64", ("batch",))])
    with pytest.raises(ModelError, match="free shape"):
        Critic((3,), conditions=[TensorSpec("text", "float32", ("batch", "length"))])
