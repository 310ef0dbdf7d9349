"""Hooks act where they say, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import tune_net as lab
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.tune import Hook, Moment, OwnLoss, TuneOptions, tune

Data = Callable[[int], Batches]


class Log(Hook):
    """Writes down every call."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def _note(self, at: Moment, what: str) -> None:
        self.log.append(f"{at.step}.{at.micro} {self.name} {what}")

    def on_parameters(self, at, values):
        self._note(at, "on_parameters")
        return values

    def on_batch(self, at, batch):
        self._note(at, "on_batch")
        return batch

    def also_run(self, at, batch):
        self._note(at, "also_run")
        return ()

    def on_loss(self, at, loss, outputs, batch):
        self._note(at, "on_loss")
        return loss

    def before_backward(self, at, loss) -> None:
        self._note(at, "before_backward")

    def after_backward(self, at) -> None:
        self._note(at, "after_backward")

    def before_step(self, at) -> None:
        self._note(at, "before_step")

    def after_step(self, at) -> None:
        self._note(at, "after_step")


def test_every_point_is_called_in_order(program: gw.Program, data: Data) -> None:
    log: list[str] = []
    options = TuneOptions(steps=1, accumulate=2)
    tune(program, data(8), options, Context(), hooks=[Log("a", log), Log("b", log)])
    batch = [
        "on_batch",
        "also_run",
        "on_parameters",
        "on_loss",
        "before_backward",
        "after_backward",
    ]
    expected = [f"0.{micro} {n} {what}" for micro in (0, 1) for what in batch for n in "ab"]
    expected += [f"0.1 {n} {what}" for what in ("before_step", "after_step") for n in "ab"]
    assert log == expected


class Halved(Hook):
    """Trains on half of the values."""

    def on_batch(self, at, batch):
        return {**batch, "x": batch["x"] / 2}


def test_the_batch_that_a_hook_makes_is_the_one_that_is_trained_on(
    program: gw.Program, data: Data
) -> None:
    x, labels = lab.images()
    halved = lab.table(program.signature, x / 2, labels, 8)
    options = TuneOptions(steps=3, lr=0.1)
    found = tune(program, data(8), options, Context(), hooks=[Halved()])
    wanted = tune(program, halved, options, Context())
    assert found.history.losses == wanted.history.losses
    assert torch.equal(found.program.state["fc.weight"], wanted.program.state["fc.weight"])


class Shrinks(Hook):
    """A loss of its own, without labels."""

    def on_loss(self, at, loss, outputs, batch):
        assert loss == 0
        return loss + outputs.square().mean()


def test_a_recipes_own_loss_needs_no_labels(program: gw.Program) -> None:
    x, _ = lab.images()
    tuned = tune(program, [(x,)], OwnLoss(steps=20, lr=0.01), Context(), hooks=[Shrinks()])
    assert tuned.history.losses[-1] < tuned.history.losses[0] / 2
    with pytest.raises(ValueError, match="the loss of this recipe is of training alone"):
        OwnLoss(hold_out=0.5)
    assert OwnLoss(hold_out=0.5, select="accuracy").loss == "own"


class Mask(Hook):
    """Trains under a fixed mask of the classifier's weight."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def on_parameters(self, at, values):
        return {**values, "fc.weight": values["fc.weight"] * self.mask}


def test_on_parameters_replaces_what_the_forward_pass_uses(program: gw.Program, data: Data) -> None:
    """Against a loop over the model with the masked weight; masked entries get no gradient."""
    mask = torch.ones(3, 64)
    mask[:, ::2] = 0
    options = TuneOptions(epochs=2, optimizer="sgd", lr=0.1, shuffle=False, schedule="constant")
    tuned = tune(program, data(8), options, Context(), hooks=[Mask(mask)])
    model = lab.fresh().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, labels = lab.images()
    for _ in range(2):
        for rows in torch.arange(48).split(8):
            optimizer.zero_grad()
            h = torch.relu(model.norm(model.conv(x[rows]))).flatten(1)
            logits = F.linear(h, model.fc.weight * mask, model.fc.bias)
            F.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
    for name, tensor in tuned.program.state.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    before, after = program.state["fc.weight"], tuned.program.state["fc.weight"]
    assert torch.equal(before[:, ::2], after[:, ::2])


def test_evaluations_use_the_replaced_values(program: gw.Program, data: Data) -> None:
    seen = []

    def evaluate(current: gw.Program) -> float:
        seen.append(float(current.state["fc.weight"].abs().sum()))
        return 0.0

    hook = Mask(torch.zeros(3, 64))
    tune(program, data(8), TuneOptions(), Context(), hooks=[hook], evaluate=evaluate)
    assert seen == [0.0]


def test_on_loss_sees_outputs_and_batch_and_adds_to_the_loss(
    program: gw.Program, data: Data
) -> None:
    """Loss + 0.5 c |b|² adds c b to the gradient of b."""

    class Decay(Hook):
        def on_loss(self, at, loss, outputs, batch):
            again = F.cross_entropy(outputs, batch["labels"])
            assert torch.equal(loss, again)
            return loss + 0.5 * 3.0 * at.parameters["fc.bias"].square().sum()

    class Gradient(Hook):
        def after_backward(self, at) -> None:
            self.grad = at.parameters["fc.bias"].grad.clone()

    plain, decayed = Gradient(), Gradient()
    options = TuneOptions(steps=1, shuffle=False)
    tune(program, data(8), options, Context(), hooks=[plain])
    tune(program, data(8), options, Context(), hooks=[Decay(), decayed])
    expected = plain.grad + 3.0 * program.state["fc.bias"].detach()
    torch.testing.assert_close(decayed.grad, expected, rtol=1e-5, atol=1e-6)  # float32


def test_gradients_and_parameters_can_be_changed(program: gw.Program, data: Data) -> None:
    class Only(Hook):
        """Lets one entry of the bias learn, and shrinks the weight after every step."""

        def after_backward(self, at) -> None:
            for name, parameter in at.parameters.items():
                keep = torch.zeros_like(parameter.grad)
                keep[..., 0] = float(name == "fc.bias")
                parameter.grad.mul_(keep)

        @torch.no_grad()
        def after_step(self, at) -> None:
            at.parameters["fc.weight"].mul_(0.5)

    options = TuneOptions(steps=3, optimizer="sgd", lr=0.1)
    after = tune(program, data(8), options, Context(), hooks=[Only()]).program.state
    before = program.state
    assert torch.equal(after["conv.weight"], before["conv.weight"])
    assert torch.equal(after["fc.weight"], before["fc.weight"] * 0.125)
    assert (after["fc.bias"] != before["fc.bias"]).tolist() == [True, False, False]


def test_a_recipe_brings_its_own_optimizer(program: gw.Program, data: Data) -> None:
    class Sign(torch.optim.Optimizer):
        def __init__(self, parameters, lr: float) -> None:
            super().__init__(parameters, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(group["lr"] * parameter.grad.sign())

    tuned = tune(
        program, data(8), TuneOptions(steps=1, lr=0.25), Context(),
        optimizer=lambda named, options: Sign(named.values(), options.lr),
    )  # fmt: skip
    moved = (tuned.program.state["fc.weight"] - program.state["fc.weight"]).abs()
    assert moved.max().item() == pytest.approx(0.25, abs=1e-6)


class Factored(Hook):
    """The classifier's weight is a product of two factors, which alone are trained."""

    def __init__(self, rank: int = 2) -> None:
        generator = torch.Generator().manual_seed(3)
        self.left = torch.nn.Parameter(torch.randn(3, rank, generator=generator))
        self.right = torch.nn.Parameter(torch.randn(rank, 64, generator=generator) / 8)

    def own(self):
        return {"recipe.left": self.left, "recipe.right": self.right}

    def on_parameters(self, at, values):
        return {**values, "fc.weight": values["recipe.left"] @ values["recipe.right"]}


def test_a_recipe_trains_parameters_of_its_own(program: gw.Program, data: Data) -> None:
    """Against a loop; the program's own parameters come back in their bytes."""
    options = TuneOptions(epochs=2, optimizer="sgd", lr=0.1, shuffle=False, schedule="constant")
    hook, other = Factored(), Factored()
    tuned = tune(program, data(8), options, Context(), hooks=[hook], names=())
    model = lab.fresh().train()
    optimizer = torch.optim.SGD([other.left, other.right], lr=0.1, momentum=0.9)
    x, labels = lab.images()
    for _ in range(2):
        for rows in torch.arange(48).split(8):
            optimizer.zero_grad()
            h = torch.relu(model.norm(model.conv(x[rows]))).flatten(1)
            F.cross_entropy(
                F.linear(h, other.left @ other.right, model.fc.bias), labels[rows]
            ).backward()
            optimizer.step()
    torch.testing.assert_close(hook.left, other.left, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hook.right, other.right, rtol=1e-5, atol=1e-6)
    assert set(tuned.program.state) == set(program.state)
    for name in program.trainable():
        assert torch.equal(tuned.program.state[name], program.state[name])


def test_a_recipes_own_parameters_survive_a_kill(
    program: gw.Program, data: Data, tmp_path: Path
) -> None:
    """The state of step 4 is loaded into a new hook, which ends where an unbroken run does."""
    options = TuneOptions(steps=8, lr=0.05)
    straight = Factored()
    tune(program, data(8), options, Context(), hooks=[straight], names=())

    class Killed(Factored):
        def after_step(self, at) -> None:
            if at.step == 5:
                raise KeyboardInterrupt

    Killed.__qualname__ = Factored.__qualname__
    context = Context(work=tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        tune(program, data(8), options, context, hooks=[Killed()], names=())
    resumed = Factored()
    tune(program, data(8), options, context, hooks=[resumed], names=())
    assert torch.equal(resumed.left, straight.left)


def test_every_hook_gets_the_outputs_of_the_runs_that_it_asked_for(
    program: gw.Program, data: Data
) -> None:
    """Gradients flow through all runs: against the sum of their losses by hand."""

    class Twice(Hook):
        """Half the loss of the batch, and a quarter of that of every other run."""

        def __init__(self, factors: tuple[float, ...]) -> None:
            self.factors, self.seen = factors, []

        def also_run(self, at, batch):
            return [{"x": batch["x"] * factor} for factor in self.factors]

        def on_loss(self, at, loss, outputs, batch):
            assert not at.also or at.is_training
            self.seen.append(len(at.also))
            return loss + sum(F.cross_entropy(o, batch["labels"]) for o in at.also)

    hooks = [Twice((0.5,)), Hook(), Twice((0.25, 2.0))]
    options = TuneOptions(steps=1, optimizer="sgd", lr=0.1, momentum=0.0, shuffle=False)
    tuned = tune(program, data(8), options, Context(), hooks=hooks)
    assert [hook.seen for hook in hooks if isinstance(hook, Twice)] == [[1], [2]]
    model = lab.fresh().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = lab.images()
    total = sum(F.cross_entropy(model(x[:8] * f), labels[:8]) for f in (1.0, 0.5, 0.25, 2.0))
    total.backward()
    optimizer.step()
    for name, tensor in tuned.program.state.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_second_run_of_the_same_batch_draws_anew(data: Data) -> None:
    program = lab.traced(lab.fresh(dropout=0.5), 4, 1, 4, 4)

    class Again(Hook):
        def also_run(self, at, batch):
            return [batch]

        def on_loss(self, at, loss, outputs, batch):
            self.gap = float((outputs - at.also[0]).detach().abs().max())
            return loss

    again = Again()
    tune(program, data(8), TuneOptions(steps=1), Context(), hooks=[again])
    assert again.gap > 0.01
