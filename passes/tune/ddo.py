"""tune.ddo: a denoiser finetuned as its own discriminator against a frozen copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.data.batches import Batches
from graphwright.ir.mode import ATTENTION, ATTENTION_DROPOUT, DROPOUTS
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.sampling.parameterization import output_of
from graphwright.ir.sampling.record import DENOISED
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.training import Levels, Recipe, Training
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course

FAKE = "fake "
"""Prefix of what belongs to samples of the reference in a batch."""


class DdoOptions(Options):
    """Options of tune.ddo."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the reference's samples against that of the data. Found for a model by trying."""

    beta: Annotated[float, Field(gt=0)] = 0.05
    """Factor on the log-likelihood ratio, which is a sum over a sample's entries: the more of them,
    the smaller. Found for a model by trying."""

    rounds: Annotated[int, Field(ge=1)] = 1
    """Rounds; in each one the reference is what the last one made, and `tune` is done once."""

    samples: Annotated[int, Field(ge=2)] = 2048
    """Samples of the reference per round, under conditions of training samples."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Steps of the denoiser's own solver for them; those that it was trained for, or 20, when
    absent."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=1e-5, schedule="constant")
    """Options of the training of a round."""


class Ddo(DenoiserRecipe[DdoOptions]):
    """Raises the likelihood of data above that of the model's own samples.

    With Delta the log-likelihood of the network less that of a frozen copy, the loss is
    -log sigmoid(beta Delta) of data - alpha log(1 - sigmoid(beta Delta)) of samples of the copy.
    Of a denoiser, Delta is a difference of denoising losses at one level and one noise that both
    networks are given: -w (|D - x0|^2 - |D_copy - x0|^2), a sum over all entries, where w makes
    squares of the network's own output of it (of the noise for epsilon, of EDM's F for edm).

    Inputs, outputs and sampling stay. Dropout is off in both networks. A reference whose likelihood
    is at its largest is where both means of the gradient vanish: what moves it from there is that
    data and samples spread differently around it.

    Source: P58 (Zheng et al. 2025, "Direct discriminative optimization"), equations 9 and 13. Its
    alpha and beta are searched for every model; the ones here are no more than a beginning.
    """

    papers = ("P58",)

    def run(self, program: Program, context: Context) -> Result:
        """Trains round after round.

        Raises:
            ModelError: no denoiser of one row per sample.
        """
        o = self.options
        training = Training(program, self.id)
        data = training.data(context.training_data)
        metrics: dict[str, float] = {}
        current = program
        for number in range(o.rounds):
            inside = context.within("round", number)
            fakes = self._fakes(training, current, data, inside)
            hook = Against(training, inside, current, fakes, o.alpha, o.beta)
            hooks = [*training_hooks(program), hook]
            tuned = tune(current, data, o.tune, inside, hooks=hooks)
            metrics |= course(tuned.history, f"round_{number}_")
            current = tuned.program
        action = Action("network", f"{o.rounds} rounds against its own samples")
        return Result(current, (action,), metrics)

    def _fakes(
        self, training: Training, reference: Program, data: Batches, context: Context
    ) -> dict[str, Tensor]:
        """Samples of the reference by name of its input, and the conditions that they are under."""
        o, g = self.options, context.generator("samples")
        steps = o.steps or training.record.steps or 20
        sampler = Sampler.of(reference)
        made: list[Tensor] = []
        told: list[dict[str, Tensor]] = []
        for batch in _endless(data):
            given = training.conditions(batch)
            noise = torch.randn(batch[training.record.sample].shape, generator=g)
            seed = int(torch.randint(2**31, (), generator=g))
            made.append(sampler.sample(noise, given, steps=steps, seed=seed))
            told.append(given)
            if sum(map(len, made)) >= o.samples:
                break
        fakes = {name: torch.cat([given[name] for given in told]) for name in told[0]}
        return {training.record.sample: torch.cat(made), **fakes}


class Against(Recipe):
    """The loss of a round."""

    def __init__(
        self, training: Training, context: Context, reference: Program, fakes: Values,
        alpha: float, beta: float,
    ) -> None:  # fmt: skip
        """Takes the frozen copy and its samples with their conditions."""
        super().__init__(training, context)
        self.reference = training.teacher(reference, context.device)
        self.fakes = {name: tensor.to(context.device) for name, tensor in fakes.items()}
        self.alpha, self.beta = alpha, beta

    def on_graph(self, graph: fx.Graph) -> None:
        """Dropout off: the two networks would differ by it at the beginning."""
        for node in graph.nodes:
            if node.target in DROPOUTS.values():
                node.args = (node.args[0], 0.0, False)
            if node.target is ATTENTION and len(node.args) > ATTENTION_DROPOUT:
                node.update_arg(ATTENTION_DROPOUT, 0.0)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """Noisy data and noisy samples, in that order, as one batch of twice the rows."""
        asked, g = self.training, self.generator(at)
        name = asked.record.sample
        count = len(batch[name])
        rows = torch.randint(len(self.fakes[name]), (count,), generator=g)
        names = (name, *asked.record.conditions)
        both = {n: torch.cat([batch[n], self.fakes[n][rows]]) for n in names}
        clean = both[name]
        levels = Levels.of(asked.draw(2 * count, g), clean.device)
        x = levels.noised(clean, torch.randn(clean.shape, generator=g).to(clean))
        numbers = {n: t.to(clean.device) for n, t in asked.numbers(2 * count, g).items()}
        inputs = asked.inputs(x, levels, asked.conditions(both) | numbers)
        return {**inputs, "clean": clean, "copy": self.reference(inputs)[DENOISED]}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """-log sigmoid(beta Delta) of data - alpha log(1 - sigmoid(beta Delta)) of samples."""
        record = self.training.record
        weight = output_weight(self.training, batch["alpha"], batch["sigma"])
        both = [outputs[DENOISED], batch["copy"]]
        own, other = ((d - batch["clean"]).square().flatten(1).sum(1) for d in both)
        delta = -weight * (own - other)
        half = len(batch[record.sample]) // 2
        return loss + ddo_loss(delta[:half], delta[half:], self.alpha, self.beta)


def ddo_loss(data: Tensor, fake: Tensor, alpha: float, beta: float) -> Tensor:
    """-E_data log sigmoid(beta Delta) - alpha E_fake log(1 - sigmoid(beta Delta)), a scalar.

    Args:
        data, fake: Delta of data and of samples of the reference, [batch].
        alpha, beta: as in the options.

    Source: P58, equation 9; log(1 - sigmoid(z)) = -softplus(z).
    """
    return F.softplus(-beta * data).mean() + alpha * F.softplus(beta * fake).mean()


def output_weight(training: Training, a: Tensor, s: Tensor) -> Tensor:
    """What |D - x0|^2 is multiplied by to be a square of the network's own output, [batch].

    Args:
        training: of the denoiser.
        a, s: levels, [batch].
    """
    record = training.record
    ends = [
        output_of(record.parameterization, d, torch.zeros_like(a), a, s, record.sigma_data)
        for d in (torch.ones_like(a), torch.zeros_like(a))
    ]
    difference: Tensor = ends[0] - ends[1]
    return difference.square()


def _endless(data: Iterable[dict[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    while True:
        yield from data
