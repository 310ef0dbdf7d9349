"""tune.f_distill: a generator in one step, by the gradient of an f-divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.parameterization import output_of
from graphwright.ir.sampling.record import DENOISED
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.training import Levels, Recipe, Training, said
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.adversarial import critic_loss, generator_loss
from graphwright.ir.tune.critic import Critic, CriticOptions
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.player import InTurns, Player, PlayerOptions, drawn_from
from graphwright.ir.tune.working import copied
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course
from graphwright.passes.tune._denoisers.divergences import Divergence, Ratios, matched, weights
from graphwright.passes.tune._denoisers.few import faint, jumps, spread_levels, told_level
from graphwright.passes.tune.guidance_distill import guided

PLAIN = 1.0
"""The scale of no guidance."""


class FDistillOptions(Options):
    """Options of tune.f_distill."""

    rules = (
        Rule("tune", "tune['accumulate'] == 1",
             "the second networks take a step per batch: leave accumulate at 1"),
        Rule("tune", "tune['optimizer'] != 'mfac'",
             "mfac counts a step in which the generator rests: choose another optimizer"),
    )  # fmt: skip

    divergence: Divergence = "js"
    """The f-divergence of the teacher from the student; `reverse_kl` is DMD2."""

    guidance_scale: Annotated[float, Field(ge=0)] = PLAIN
    """Scale of the classifier-free guidance of the teacher; 1 is none (the paper has 1.75 for
    Stable Diffusion 1.5)."""

    gan_weight: Annotated[float, Field(gt=0)] = 1e-3
    """Factor of the generator's adversarial loss. The discriminator gives the ratio of densities,
    so there is no recipe without it."""

    student_every: Annotated[int, Field(ge=1)] = 5
    """Steps of which the generator takes one; in the others the model of its samples and the
    discriminator learn."""

    bins: Annotated[int, Field(ge=1)] = 10
    """Bins of noise levels, in each of which the ratio is divided by its mean."""

    ratio_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the average of those means over steps; 0 takes the batch's own (the paper has 0.5
    for ImageNet)."""

    fake: PlayerOptions = PlayerOptions(lr=1e-5, betas=(0.9, 0.999))
    """Training of the model of the generator's samples."""

    critic: CriticOptions = CriticOptions(lr=1e-5, betas=(0.9, 0.999))
    """The discriminator and its training."""

    tune: OwnLoss = OwnLoss(lr=1e-5, schedule="constant")
    """Options of training."""


class FDistill(DenoiserRecipe[FDistillOptions]):
    """Makes a generator of one step whose samples are distributed as the denoiser's.

    The generator is the denoiser at its noisiest level. Its samples x get noise; there the frozen
    denoiser predicts data D_T, and a copy of it that keeps learning the generator's own samples
    D_F. x moves along h(r) (D_T - D_F): the gradient of the f-divergence at that level, where r is
    the ratio of densities that a discriminator of noisy samples gives, and h(r) = f''(r) r^2. The
    result says in its record that it is sampled in one step.

    The discriminator reads noisy samples, the level and the conditions; in the released code it
    reads features of the teacher's network. Real samples are the training data.

    Source: P26 (Xu et al. 2025), with ratios of mean one per bin of noise and weights of mean one,
    as the released code does.
    """

    papers = ("P26",)

    def run(self, program: Program, context: Context) -> Result:
        """Trains the three networks in turns.

        Raises:
            ModelError: no plain denoiser, or guidance without conditions or on top of its own.
        """
        o = self.options
        training = Training(program, self.id)
        if o.guidance_scale != PLAIN:
            if training.record.guidance is not None:
                raise ModelError(f"{self.id}: the denoiser guides by itself, at scales of its own",
                                 fix="Leave `guidance_scale` out.")  # fmt: skip
            training.without({n: torch.zeros(1) for n in training.record.conditions})  # or refuses
        grid = jumps(training, 1)
        start = training.path(grid, 1).levels[0]
        game = Game(training, context, o, start)
        tuned = tune(program, training.data(context.training_data), o.tune, context,
                     hooks=[*training_hooks(program), game])  # fmt: skip
        made = training.sampled_in(tuned.program, 1, grid, "euler")
        action = Action("network", f"one step, by the divergence {o.divergence}")
        return Result(made, (action,), course(tuned.history), warnings=faint(training, start))


class Game(InTurns, Recipe):
    """The generator's step, and the steps of the two networks that it is measured by."""

    counts_on_last_step = False

    def __init__(
        self, training: Training, context: Context, options: FDistillOptions, start: Level
    ) -> None:
        """Takes the denoiser and the level that the generator starts from."""
        Recipe.__init__(self, training, context)
        InTurns.__init__(self, options.student_every)
        self.options, self.start = options, start
        device, program = context.device, training.program
        self.teacher = training.teacher(program, device)
        specs = {spec.name: spec for spec in program.signature.inputs}
        record = training.record
        shape = training.program.examples[[*specs].index(record.sample)].shape[1:]
        with drawn_from(context.generator("critic")):
            critic = Critic(shape, options.critic.width, 1, [specs[n] for n in record.conditions])
        self.names = [*specs]
        self.fake = Player(copied(program, device), options.fake, options.tune, device)
        self.critic = Player(critic, options.critic, options.tune, device)
        self.ratios = Ratios(options.bins, options.ratio_ema, self.critic.processes.device)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """The generator's inputs: noise at its one level."""
        clean = batch[self.training.record.sample]
        g = self.generator(at, "start")
        noise = torch.randn(clean.shape, generator=g).to(clean)
        numbers = self.training.numbers(len(clean), g)
        given = self.training.conditions(batch)
        given |= {name: number.to(clean.device) for name, number in numbers.items()}
        levels = Levels.of([self.start] * len(clean), clean.device)
        asked = self.training.inputs(self.training.start(noise, self.start), levels, given)
        return {**batch, **asked, REAL: clean}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """The generator's loss; in its steps of rest the others learn."""
        x, given = outputs[DENOISED], {**self.training.conditions(batch), **self._numbers(batch)}
        g = self.generator(at, "levels")
        found = spread_levels(self.training, len(x), g)
        levels = Levels.of([level for level, _ in found], x.device)
        noise = [torch.randn(x.shape, generator=g).to(x) for _ in range(2)]
        if self.is_at_rest(at):
            x = x.detach()
            value = self._learn(at, x, batch[REAL], levels, noise, given)
            return self.resting(value, outputs[DENOISED])
        times = torch.tensor([time for _, time in found], device=x.device)
        return loss + self._student(x, levels, times, noise[0], given)

    def _student(
        self, x: Tensor, levels: Levels, times: Tensor, noise: Tensor, given: Values
    ) -> Tensor:
        o, asked = self.options, self.training
        noisy = levels.noised(x, noise)
        with self.critic.fixed() as critic:
            logits = critic(noisy, told_level(levels), given)
        noisy = noisy.detach()
        if o.guidance_scale == PLAIN:
            real = said(self.teacher(asked.inputs(noisy, levels, given))).denoised
        else:
            scales = torch.full((len(x),), o.guidance_scale, device=x.device)
            real = guided(self.teacher, asked, noisy, levels, given, scales)
        with torch.no_grad():
            fake = self._model(asked.inputs(noisy, levels, given))
        weight = weights(o.divergence, self.ratios(logits, times))
        return matched(x, real, fake, weight) + o.gan_weight * generator_loss(logits)

    def _learn(
        self, at: Moment, x: Tensor, real: Tensor, levels: Levels, noise: list[Tensor],
        given: Values,
    ) -> Tensor:  # fmt: skip
        """A step of the model of the samples, and one of the discriminator."""
        noisy, told = levels.noised(x, noise[0]), told_level(levels)
        found = self._model(self.training.inputs(noisy, levels, given))
        kind, spread = self.training.record.parameterization, self.training.record.sigma_data
        a, s = over(levels.a, x), over(levels.s, x)
        gap = [output_of(kind, data, noisy, a, s, spread) for data in (found, x)]
        value = self.fake.learn(at, (gap[0] - gap[1]).square().mean())
        critic = self.critic.network
        reals = critic(levels.noised(real, noise[1]), told, given)
        return value + self.critic.learn(at, critic_loss(reals, critic(noisy, told, given)))

    def _numbers(self, batch: Values) -> dict[str, Tensor]:
        """Scales that a denoiser with guidance of its own is told."""
        guidance = self.training.record.guidance
        return {} if guidance is None else {name: batch[name] for name in guidance.parameters}

    def _model(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The data that the model of the generator's samples predicts."""
        data: Tensor = self.fake.network(*(inputs[name] for name in self.names))[0]
        return data

    def state_dict(self) -> dict[str, Any]:
        """Both networks, and the mean ratios."""
        return {"fake": self.fake.state_dict(), "critic": self.critic.state_dict(),
                "ratios": self.ratios.means}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self.fake.load_state_dict(state["fake"])
        self.critic.load_state_dict(state["critic"])
        self.ratios.means = state["ratios"].to(self.ratios.means.device)


REAL = "real samples"
"""Place in the batch of the data without noise."""
