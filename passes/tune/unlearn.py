"""tune.unlearn: a generator that no longer makes what is undesired."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import Batches, as_batches
from graphwright.ir.errors import ModelError
from graphwright.ir.options import Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Moment, OwnLoss, Tuned, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_output, wide
from graphwright.ir.tune.working import copied
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of
from graphwright.passes.tune._generator.latents import STEP_PER_BATCH, latents_of, shape_made
from graphwright.passes.tune._generator.stage import Stage, StageOptions, logits_of, marked
from graphwright.passes.tune._generator.weights import (
    Repulsion,
    elastic,
    fisher_diagonal,
    repelled,
    weight_distance,
)

AS_RELEASED = OwnLoss(optimizer="adam", lr=2e-3, betas=(0.0, 0.99), schedule="constant")
"""Both trainings, but for their lengths."""


class UnlearnOptions(StageOptions):
    """Options of tune.unlearn."""

    rules: ClassVar[tuple[Rule, ...]] = (
        STEP_PER_BATCH,
        Rule("adapt", "adapt is None or adapt['accumulate'] == 1",
             "the discriminator takes a step per batch: leave accumulate at 1"),
        Rule("tune", "tune['optimizer'] != 'mfac' and (adapt is None or"
             " adapt['optimizer'] != 'mfac')",
             "mfac counts a step in which the generator rests: choose another optimizer"),
    )  # fmt: skip

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    undesired: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """Labels of what is to be unlearned."""

    ewc: Annotated[float, Field(ge=0)] = 5e8
    """Factor of the elastic penalty of the first stage; it goes with the size of the
    discriminator's gradients."""

    fisher_samples: Annotated[int, Field(ge=1)] = 32
    """Samples of which its Fisher diagonal is made."""

    copies: Annotated[int, Field(ge=1)] = 1
    """Adapted copies, each with random numbers of its own; the second stage goes away from all."""

    repulsion: Repulsion = "exponential"
    """Loss of the distance d from the adapted weights: 100 exp(-gamma d), -gamma d (`l2`, which
    falls without end: keep the training short or set tune.clip_norm), or gamma / d."""

    gamma: Annotated[float, Field(gt=0)] = 1.0
    """Its factor."""

    adapt: OwnLoss | None = AS_RELEASED
    """Options of the training of the adapted copies; null for those of `tune`."""

    tune: OwnLoss = AS_RELEASED
    """Options of the training that unlearns. The data is the generator's inputs; labels say what it
    makes of each."""


class Unlearn(Pass[UnlearnOptions]):
    """Trains a generator not to make what is undesired, without its training data: from marks on
    what it makes itself.

    The labels say of every row of inputs what the generator makes of it. First a copy is adapted to
    make what is undesired, by a discriminator whose real samples are the marked ones, under
    (ewc / 2) sum F (w - w0)^2; F is the mean over samples of the squared gradient of the
    discriminator's logit. Then the generator is trained from its first weights, by a discriminator
    whose real samples are all others, with a loss that pushes its weights away from the adapted
    ones. Their distance is half the mean squared difference per tensor in training, a mean over
    tensors. (In the released code d grows with the square of the number of copies; here it is
    their mean.) Both losses of the generator are the ones that do not saturate.

    What belongs to one architecture alone, such as regularized path lengths, is left out.

    Source: P37 (Tiwary et al., "Adapt then unlearn"), with factors as released; the head start of
    the discriminators is ours, for generators that come without one.
    """

    papers = ("P37",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        """Adapts copies, and unlearns.

        Raises:
            ArgumentError: labels or latents do not fit, no sample is marked or all are, or the
                discriminator does not take what the generator makes.
            ModelError: the output is not one sample of a fixed size per row, or adapting has left
                the weights as they were.
        """
        o = self.options
        latents_of(program, o.latents, self.id)
        shape_made(program, self.id)
        data = as_batches(context.training_data, program.signature)
        undesired, kept = marked(data, o.undesired, self.id)
        chosen = chosen_parameters(program, o.targets, self.id)

        adapted, metrics = [], dict[str, float]()
        for index in range(o.copies):
            inside = context.within("adapt", index)
            stage = Adapt(program, inside, o, undesired, chosen.names, self.id)
            tuned = self._trained(stage, data, o.adapt or o.tune, inside, chosen.names)
            adapted.append({name: tuned.program.state[name].detach() for name in chosen.names})
            metrics |= {f"adapt_{n}": value for n, value in metrics_of(tuned.history).items()}
        start = {name: program.state[name].detach() for name in chosen.names}
        if not float(weight_distance(start, adapted)):
            raise ModelError(
                f"{self.id}: adapting has left the weights as they were, so that there is nothing "
                "to go away from",
                fix="Give `adapt` more steps or a higher rate, or lower `ewc`.",
            )
        inside = context.within("unlearn")
        last = Repel(program, inside, o, kept, adapted, self.id)
        tuned = self._trained(last, data, o.tune, inside, chosen.names)
        metrics |= metrics_of(tuned.history)
        if last.distances:  # of the generator's steps: an early stop may leave none
            metrics["first_distance"] = last.distances[0]
            metrics["last_distance"] = last.distances[-1]
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics)

    def _trained(
        self, stage: Stage, data: Batches, options: OwnLoss, inside: Context,
        names: Collection[str],
    ) -> Tuned:  # fmt: skip
        """A training of its own, from the program's first weights."""
        hooks = [*training_hooks(stage.program), stage]
        return tune(stage.program, data, options, inside, names=names, hooks=hooks)


class Adapt(Stage):
    """The first stage: what is undesired, near the first weights.

    Attributes:
        fisher: diagonal by parameter; empty until the discriminator's head start is over.
    """

    def __init__(
        self, program: Program, context: Context, options: UnlearnOptions, rows: Values,
        names: Collection[str], by: str,
    ) -> None:  # fmt: skip
        """Takes what a stage takes, and the names of the parameters in training."""
        super().__init__(program, context, options, rows, options.adapt or options.tune, by)
        self.names, self.context = sorted(names), context
        self.ewc, self.count = options.ewc, options.fisher_samples
        device = self.critic.processes.device
        self.start = {name: program.state[name].detach().to(device) for name in self.names}
        self.fisher: dict[str, Tensor] = {}

    def on_weights(self, at: Moment) -> Tensor:
        """The elastic penalty."""
        if not self.fisher:
            self.fisher = self._fisher()
        return self.ewc * elastic(at.parameters, self.start, self.fisher)

    def _fisher(self) -> dict[str, Tensor]:
        """Of the discriminator's logits of what the first generator makes of new latents."""
        count, g = self.count, self.context.generator("fisher")
        device = self.critic.processes.device
        module = copied(self.program, device)
        rows = {}
        for name, value in self.rows.items():
            taken = value[torch.randint(len(value), (count,), generator=g)]
            new = torch.randn(taken.shape, generator=g, dtype=torch.float64)
            rows[name] = (new.to(taken) if name in self.latents else taken).to(device)
        signature = self.program.signature
        flat = module(*(rows[spec.name] for spec in signature.inputs))
        values = dict(module.named_parameters())
        with self.critic.fixed() as critic:
            logits = logits_of(critic, wide(flat[main_output(signature)]))
        return fisher_diagonal(logits, {name: values[name] for name in self.names})

    def state_dict(self) -> dict[str, Any]:
        """The discriminator and the Fisher diagonal."""
        return {**super().state_dict(), "fisher": self.fisher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        super().load_state_dict(state)
        device = self.critic.processes.device
        self.fisher = {name: value.to(device) for name, value in state["fisher"].items()}


class Repel(Stage):
    """The second stage: all but what is undesired, away from the adapted weights.

    Attributes:
        distances: of the weights from the adapted ones, in the generator's first and last step.
    """

    def __init__(
        self, program: Program, context: Context, options: UnlearnOptions, rows: Values,
        adapted: Sequence[Mapping[str, Tensor]], by: str,
    ) -> None:  # fmt: skip
        """Takes what a stage takes, and the adapted weights of every copy."""
        super().__init__(program, context, options, rows, options.tune, by)
        device = self.critic.processes.device
        self.adapted = [{n: value.to(device) for n, value in each.items()} for each in adapted]
        self.repulsion, self.gamma = options.repulsion, options.gamma
        self.distances: list[float] = []

    def on_weights(self, at: Moment) -> Tensor:
        """The repulsion."""
        distance = weight_distance(at.parameters, self.adapted)
        value = float(distance.detach())
        self.distances = [*self.distances[:1], value]
        return repelled(self.repulsion, distance, self.gamma)

    def state_dict(self) -> dict[str, Any]:
        """The discriminator and the distances."""
        return {**super().state_dict(), "distances": self.distances}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        super().load_state_dict(state)
        self.distances = state["distances"]
