"""tune.ddgan: few large steps, each of them a conditional generative adversarial network."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.record import DENOISED, FACT, LATENT
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.surgery import Interface
from graphwright.ir.sampling.training import Levels, Recipe, Training
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.adversarial import critic_loss, generator_loss, r1_penalty
from graphwright.ir.tune.critic import Critic, CriticOptions
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.player import Player, drawn_from
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course
from graphwright.passes.tune._denoisers.few import faint, jumps, told_level
from graphwright.passes.tune._denoisers.latent import tell_latent
from graphwright.passes.tune._denoisers.posterior import Pairs

OTHER, FRESH = "the less noisy sample", "noise of the posterior"
LEVELS = "numbers of the levels"
"""Places in the batch."""


class DdganOptions(Options):
    """Options of tune.ddgan."""

    rules = (
        Rule("tune", "tune['accumulate'] == 1",
             "the discriminator takes a step per batch: leave accumulate at 1"),
    )  # fmt: skip

    steps: Annotated[int, Field(ge=1, le=64)] = 4
    """Steps of the result; the paper has 4, and 2 for large images."""

    grid: Grid | None = None
    """Levels of the steps; equal in the time of the schedule (of edm in sigma^(1/7)) when
    absent."""

    latent: Annotated[int, Field(ge=1)] = 100
    """Size of the noise that the generator is given in every step."""

    latent_width: Annotated[int, Field(ge=4)] = 256
    """Width of the four layers that it goes through."""

    r1_gamma: Annotated[float, Field(ge=0)] = 0.02
    """Factor gamma of gamma / 2 ||d logit / d x'||^2 on real pairs."""

    r1_every: Annotated[int, Field(ge=1)] = 15
    """Steps of which one has this penalty, without a factor for the others."""

    critic: CriticOptions = CriticOptions(lr=1.25e-4, betas=(0.5, 0.9))
    """The discriminator and its training."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=1.6e-4, betas=(0.5, 0.9), min_lr=1e-5, ema=0.9999)
    """Options of training."""


class Ddgan(DenoiserRecipe[DdganOptions]):
    """Makes a denoiser of few large steps, in each of which the data it predicts is a sample.

    The network gets an input `latent`, told at the embedding of time through a map that is zero at
    first. Its data x0 = G(x, t, latent) goes through the posterior q(x' | x, x0), and a
    discriminator that sees (x', x), the level and the conditions tells such pairs from pairs of the
    forward process. The result says in its record how it is sampled: `steps` steps of ancestral
    sampling, which is that posterior; the driver draws a latent for every step.

    Real pairs and made ones are of the same x, and the generator is judged on the very samples that
    the discriminator has learned from; the released code draws both anew. Its discriminator has a
    standard deviation over the batch as a feature, this one judges every pair alone. Levels are
    those of the denoiser's schedule, with no noise behind the last step.

    Source: P85 (Xiao et al. 2022), equation 4 and appendix B, with the rates of CIFAR-10.
    """

    papers = ("P85",)
    changes_interface: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """Adds the latent and trains.

        Raises:
            ModelError: no plain denoiser, guidance in it, or no embedding of time to tell the
                latent at.
            ArgumentError: no such levels on this schedule.
        """
        o = self.options
        training = Training(program, self.id)
        if training.record.guidance is not None:
            raise ModelError(f"{self.id}: guidance is in this denoiser, and a discriminator would "
                             "train it away", fix="Leave tune.guidance_distill out.")  # fmt: skip
        grid = o.grid or jumps(training, o.steps)
        levels = training.path(grid, o.steps).levels
        student = self._student(program, training, context)
        game = Pairing(training, context, o, levels)
        tuned = tune(student, training.data(context.training_data), o.tune, context,
                     hooks=[*training_hooks(program), game])  # fmt: skip
        made = training.sampled_in(tuned.program, o.steps, grid, "euler", eta=1.0)
        action = Action("network", f"{o.steps} steps, each with a latent of {o.latent}")
        found = {**course(tuned.history), "last_critic_loss": game.last}
        return Result(made, (action,), found, warnings=faint(training, levels[0]))

    def _student(self, program: Program, training: Training, context: Context) -> Program:
        """The network with the latent, and the same function whatever it is."""
        o = self.options
        edit = Interface(program, self.id)
        with drawn_from(context.generator("latent")):
            tell_latent(edit, self.id, o.latent, o.latent_width)
        edit.editor.facts[FACT] = training.record.replace(latent=o.latent).to_json()
        made = edit.finish()
        defaults = {**made.signature.defaults, LATENT: "zeros"}
        return made.replace(signature=replace(made.signature, defaults=defaults))


class Pairing(Recipe):
    """Pairs of samples at neighbouring levels, real and made, and a discriminator of them."""

    def __init__(
        self, training: Training, context: Context, options: DdganOptions, levels: tuple[Level, ...]
    ) -> None:
        """Takes the levels of the steps."""
        super().__init__(training, context)
        self.options, self.levels, self.last = options, levels, 0.0
        program, record = training.program, training.record
        names = [spec.name for spec in program.signature.inputs]
        channels, *sizes = program.examples[names.index(record.sample)].shape[1:]
        told = [s for s in program.signature.inputs if s.name in record.conditions]
        with drawn_from(context.generator("critic")):
            critic = Critic((2 * channels, *sizes), options.critic.width, 1, told)
        self.critic = Player(critic, options.critic, options.tune, context.device)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """The noisier sample of a pair, a latent, and the other sample."""
        asked, g = self.training, self.generator(at)
        clean = batch[asked.record.sample]
        n = len(clean)
        places = torch.randint(len(self.levels) - 1, (n,), generator=g)
        drawn = [torch.randn(clean.shape, generator=g).to(clean) for _ in range(3)]
        latent = torch.randn(n, self.options.latent, generator=g).to(clean.device)
        other, x = self._pairs(places, clean.device).drawn(clean, drawn[0], drawn[1])
        here = Levels.of([self.levels[i] for i in places.tolist()], clean.device)
        return {
            **batch, **asked.inputs(x, here, asked.conditions(batch)), LATENT: latent,
            OTHER: other, FRESH: drawn[2], LEVELS: places,
        }  # fmt: skip

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """A step of the discriminator, and the generator's loss behind it."""
        asked, o = self.training, self.options
        x, given = batch[asked.record.sample], asked.conditions(batch)
        pairs = self._pairs(batch[LEVELS], x.device)
        made = pairs.posterior(outputs[DENOISED], x, batch[FRESH])
        here = Levels.of([self.levels[i] for i in batch[LEVELS].tolist()], x.device)
        told = told_level(here)

        def judged(network: torch.nn.Module, other: Tensor) -> Tensor:
            logits: Tensor = network(torch.cat([other, x], 1), told, given)
            return logits

        critic = self.critic.network
        real = batch[OTHER].detach().requires_grad_()
        logits = judged(critic, real)
        value = critic_loss(logits, judged(critic, made.detach()))
        if o.r1_gamma and at.step % o.r1_every == 0:
            value = value + o.r1_gamma / 2 * r1_penalty(logits, real)
        self.last = float(self.critic.learn(at, value))
        with self.critic.fixed() as network:
            return loss + generator_loss(judged(network, made))

    def _pairs(self, places: Tensor, device: torch.device) -> Pairs:
        found = places.tolist()
        here, there = ([self.levels[i + n] for i in found] for n in (0, 1))
        return Pairs.of(here, there, device)

    def state_dict(self) -> dict[str, Any]:
        """The discriminator."""
        return {"critic": self.critic.state_dict(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.critic.load_state_dict(state["critic"])
        self.last = state["last"]
