"""A second network that trains against the program, with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.options import Options
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.ir.tune.options import TuneOptions
from graphwright.ir.tune.processes import Processes
from graphwright.ir.tune.schedule import lr_factor

Beta = Annotated[float, Field(ge=0, lt=1)]


class PlayerOptions(Options):
    """Options of the training of a second network: by Adam, without decay of its weights."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate; it follows the course of that of `tune` (warm-up and schedule)."""

    betas: tuple[Beta, Beta] = (0.5, 0.9)
    """Decay rates of Adam's two moments."""

    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all its gradients together. Off when absent."""


class Player:
    """A network in training beside the program's: a discriminator, or a model of its samples.

    A hook holds it, and calls `learn` in its `on_loss`. Its state belongs into the hook's:
    `state_dict` and `load_state_dict` go into those of the hook. Processes that train together
    average its gradients; the network has no running statistics, which they would not.

    Attributes:
        network: in training, on the device.
    """

    def __init__(
        self, network: nn.Module, options: PlayerOptions, tune: TuneOptions, device: torch.device
    ) -> None:
        """
        Args:
            network: with its first values, the same in every process (see `drawn_from`).
            options: how it is trained.
            tune: options of the program's training.
            device: where that takes place.
        """
        self.processes = Processes(device)
        self.network = network.to(self.processes.device)
        self.options, self.tune = options, tune
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=options.lr, betas=options.betas)

    def learn(self, at: Moment, loss: Tensor) -> Tensor:
        """Takes one step down a loss; returns its value, the mean over processes.

        Gradients go to this network's parameters alone: nothing is added to the program's.

        Args:
            at: where the loop stands.
            loss: of the network's outputs, a scalar. What the program made is detached in it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * lr_factor(self.tune, at.step, at.total)
        found = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        value = loss.detach().clone()
        self.processes.mean_([value, *found])
        for parameter, gradient in zip(self.parameters, found, strict=True):
            parameter.grad = gradient
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    @contextmanager
    def fixed(self) -> Iterator[nn.Module]:
        """The network with parameters that take no gradient: what it reads still does."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        try:
            yield self.network
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and moments, for the state of a hook."""
        return {
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class InTurns(Hook):
    """The program learns in the first of every `every` steps, and rests in the others.

    In a step of rest the second networks alone learn, on a batch of their own: `on_loss` returns
    `resting(...)`, and neither the parameters nor the moments of the optimizer move.
    """

    def __init__(self, every: int) -> None:
        """Takes the number of steps of which the program has one."""
        self.every = every

    def is_at_rest(self, at: Moment) -> bool:
        """Whether the program rests in this step."""
        return at.step % self.every != 0

    def resting(self, value: Tensor, output: Tensor) -> Tensor:
        """A loss of this value without any gradient.

        Args:
            value: scalar, for the record of losses.
            output: one of the program's. Where processes train together, backward has to go
                through it, for they wait for each other's gradients.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return value.detach() + 0.0 * output.sum()
        return value.detach().clone().requires_grad_()

    def before_step(self, at: Moment) -> None:
        """Takes the gradients away in a step of rest: torch's optimizers skip what has none."""
        if self.is_at_rest(at):
            for parameter in at.parameters.values():
                parameter.grad = None


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Within it new modules draw their first values from a generator's seed.

    The caller's own random numbers are put back behind it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        yield
