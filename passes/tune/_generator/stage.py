"""A generator against a discriminator whose real samples it made itself before."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.data.batches import Batches
from graphwright.ir.data.sources import import_object
from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Bounded, Rule
from graphwright.ir.program import Program
from graphwright.ir.tune import Moment, OwnLoss
from graphwright.ir.tune.adversarial import critic_loss, generator_loss, r1_penalty
from graphwright.ir.tune.critic import Critic, CriticOptions
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.ir.tune.options import Function
from graphwright.ir.tune.player import InTurns, Player, drawn_from
from graphwright.ir.tune.working import frozen
from graphwright.passes.base import Context
from graphwright.passes.tune._generator.latents import drawn, latents_of, shape_made


class StageOptions(Bounded):
    """Options of the discriminator, and of how it is met."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("r1_every", "'r1_every' not in given or r1 > 0", "r1_every has no part in r1 0"),
    )

    latents: tuple[str, ...] | None = None
    """Inputs that are drawn anew in every step, from a standard normal distribution. When absent,
    the generator's one input."""

    discriminator: Function | None = None
    """Function that gives the generator's own discriminator, a module that maps samples to logits
    (batch,) or (batch, 1), high for what is real; copies of it are trained. When absent, a new one
    is."""

    critic: CriticOptions = CriticOptions(lr=2e-3, betas=(0.0, 0.99))
    """A new discriminator (`width`), and the training of either."""

    head_start: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps of each stage in which the discriminator learns alone."""

    r1: Annotated[float, Field(ge=0)] = 10.0
    """Factor of the discriminator's R1 penalty."""

    r1_every: Annotated[int, Field(ge=1)] = 16
    """Steps of which one has the penalty, that many times."""


class Stage(InTurns, ABC):
    """The generator against a discriminator whose real samples are rows of its own.

    Attributes:
        program: the generator as it was.
        critic: the discriminator.
    """

    counts_steps = True
    counts_on_last_step = False

    def __init__(
        self, program: Program, context: Context, options: StageOptions, rows: Values,
        training: OwnLoss, by: str,
    ) -> None:  # fmt: skip
        """
        Args:
            program: the generator.
            context: seed, device and folder.
            options: of the pass.
            rows: inputs from which the first generator makes the real samples.
            training: options of this stage's training.
            by: id of the pass, for messages.
        """
        super().__init__(1)
        self.program, self.options, self.by = program, options, by
        self.source = frozen(program, context.device)
        self.latents, self.rows = latents_of(program, options.latents, by), rows
        self.critic = Player(self._critic(context), options.critic, training, context.device)

    def is_at_rest(self, at: Moment) -> bool:
        """The discriminator's head start."""
        return at.step < min(round(self.options.head_start * at.total), at.total - 1)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """New latents."""
        return drawn(batch, self.latents)

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """A step of the discriminator; the generator's loss where it does not rest."""
        output = wide(main_of(self.program.signature, outputs))
        index = torch.randint(len(next(iter(self.rows.values()))), (len(output),))
        real = self._made({name: rows[index] for name, rows in self.rows.items()}).to(output)
        value = self.critic.learn(at, self._judged(at, real, output.detach()))
        if self.is_at_rest(at):
            return self.resting(value, output)
        with self.critic.fixed() as critic:
            logits = logits_of(critic, output)
        return loss + generator_loss(logits) + self.on_weights(at)

    @abstractmethod
    def on_weights(self, at: Moment) -> Tensor:
        """The loss of the weights in training."""

    def _judged(self, at: Moment, real: Tensor, made: Tensor) -> Tensor:
        """The discriminator's loss."""
        o, critic = self.options, self.critic.network
        penalized = o.r1 > 0 and at.step % o.r1_every == 0
        real = real.requires_grad_(penalized)
        logits = logits_of(critic, real)
        loss = critic_loss(logits, logits_of(critic, made))
        if penalized:
            loss = loss + o.r1 / 2 * o.r1_every * r1_penalty(logits, real)
        return loss

    def _made(self, rows: Values) -> Tensor:
        """What the first generator makes of inputs."""
        device = self.critic.processes.device
        with torch.no_grad():
            found = self.source(**{name: value.to(device) for name, value in rows.items()})
        return wide(main_of(self.program.signature, found)).detach()

    def _critic(self, context: Context) -> nn.Module:
        name = self.options.discriminator
        if name is None:
            with drawn_from(context.generator("critic")):
                return Critic(shape_made(self.program, self.by), self.options.critic.width)
        given: Any = import_object(name, context.folder, "the discriminator")
        module = copy.deepcopy(given if isinstance(given, nn.Module) else given())
        if not isinstance(module, nn.Module):
            raise ArgumentError("gives no torch module", where=name)
        with torch.no_grad():
            example = main_of(self.program.signature, self.program(*self.program.examples))
        logits_of(module.to(context.device), wide(example).to(context.device))  # or refuses
        return module

    def state_dict(self) -> dict[str, Any]:
        """The discriminator."""
        return {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.critic.load_state_dict(state["critic"])


def marked(
    data: Batches, undesired: Sequence[int], by: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs whose labels are undesired, and all others, on the CPU.

    Args:
        data: inputs with labels.
        undesired: labels.
        by: id of the pass, for messages.

    Raises:
        ArgumentError: labels are not one whole number per sample, or all samples are of one kind.
    """
    found: tuple[list[Values], list[Values]] = ([], [])
    for inputs, labels in data.labelled():
        if labels is None or labels.dim() != 1 or labels.is_floating_point():
            given = "there are none" if labels is None else f"{list(labels.shape)} {labels.dtype}"
            raise ArgumentError(f"{by} needs labels, a whole number per sample: {given}",
                                where=data.source, fix="Add an array named `labels`.")  # fmt: skip
        is_undesired = torch.isin(labels.cpu().long(), torch.tensor(undesired))
        for rows, chosen in zip(found, (is_undesired, ~is_undesired), strict=True):
            rows.append({name: value.cpu()[chosen] for name, value in inputs.items()})
    first, rest = ({n: torch.cat([r[n] for r in rows]) for n in rows[0]} for rows in found)
    for inputs, kind in ((first, "none"), (rest, "every one")):
        if not len(next(iter(inputs.values()))):
            raise ArgumentError(f"{by}: of the samples {kind} has a label of {list(undesired)}",
                                where=data.source, fix="Say in `undesired` which labels are meant.",
            )  # fmt: skip
    return first, rest


def logits_of(critic: nn.Module, samples: Tensor) -> Tensor:
    """Logits [batch] of samples.

    Raises:
        ArgumentError: a discriminator of the user's does not take the samples, or gives more.
    """
    try:
        found = critic(samples)
    except Exception as error:  # whatever the user's module does
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ArgumentError(f"the discriminator does not take samples of the shape "
                            f"{list(samples.shape)}: {first}") from error  # fmt: skip
    if not isinstance(found, Tensor) or found.numel() != len(samples):
        raise ArgumentError("the discriminator gives no logits (batch,) or (batch, 1)")
    return found.flatten()
