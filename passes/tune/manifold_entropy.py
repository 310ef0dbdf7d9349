"""tune.manifold_entropy: a generator against a discriminator whose embeddings are spread out."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.critic import CONVOLUTIONS, Critic, CriticOptions
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.ir.tune.player import InTurns, Player, drawn_from
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of
from graphwright.passes.tune._generator.latents import (
    STEP_PER_BATCH,
    drawn,
    latents_of,
    shape_made,
)

LEAST = 1e-12
"""Mean distance below which the logarithm does not go on falling."""

VIEW_NOISE = 1e-3
"""Deviation of the noise in the other view of a sample."""

AIM_NOISE = 0.05
"""Deviation of the noise on the embeddings that those of mixed samples are drawn to."""


class ManifoldEntropyOptions(Bounded):
    """Options of tune.manifold_entropy."""

    rules = (
        STEP_PER_BATCH,
        Rule("tune", "tune['optimizer'] != 'mfac' or generator_every == 1",
             "mfac counts a step in which the generator rests: choose another optimizer"),
    )  # fmt: skip

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    latents: tuple[str, ...] | None = None
    """Inputs that are drawn anew in every step, from a standard normal distribution; their values
    in the data are not read. Others are conditions, which the discriminator is told. When absent,
    the generator's one input."""

    outputs: Annotated[int, Field(ge=1)] = 8
    """Numbers that the discriminator gives for a sample."""

    dlle: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance between the embeddings of a sample and of another view of it."""

    disomap: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance between the embedding of a mix and the mix of the embeddings."""

    entropy: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the entropy at its height."""

    entropy_rise: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which that factor rises from 0."""

    buffer: Annotated[int, Field(ge=1)] = 1024
    """Embeddings of the last steps, real ones and made ones, in which nearest ones are looked
    for."""

    flips: bool = True
    """Whether the other view of an image is mirrored, along one of its sides that is drawn for the
    batch; vectors never are."""

    generator_every: Annotated[int, Field(ge=1)] = 5
    """Steps of which the generator takes one; the discriminator takes them all."""

    critic: CriticOptions = CriticOptions(lr=2e-4)
    """The discriminator and its training."""

    tune: OwnLoss = OwnLoss(
        optimizer="adam", lr=2e-4, betas=(0.5, 0.9), schedule="step", step_share=0.025, gamma=0.9
    )
    """Options of training. Labels are real samples, in the form of what the generator makes."""


class ManifoldEntropy(Pass[ManifoldEntropyOptions]):
    """Trains a generator against a discriminator f with several outputs, whose embeddings of the
    generator's samples are driven apart, so that it does not make the same things again and again.

    With x real, x' made, and all means over samples and outputs, f minimizes

        mean f(x') - mean f(x) + dlle * (d(f(x), f(v(x))) + d(f(x'), f(v(x'))))
        + disomap * d(f(a x + (1 - a) x'), a f(x) + (1 - a) f(x') + noise) - w H(f(x)),

    and the generator -mean f(x') - w H(f(x')). d is the mean squared difference, with no gradient
    through the second argument; v another view of a sample, mirrored and with a little noise; a is
    standard normal, one per sample, so that mixes also lie beyond both; and H the log of the mean
    squared distance from an embedding to the nearest one of a buffer, w its rising factor.

    The buffers are queues of `buffer` embeddings. (In the released code each shrinks to the batch
    before, of which every sample is compared with the one in its own place.) The discriminator's
    layers are divided by their spectral norms as there; its outputs are not drawn around a mean.
    Of several processes each has buffers of its own.

    Source: P51 (MEE): the maximum-entropy loss, DLLE and DIsoMap, as released but for the buffers.
    """

    papers = ("P51",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        """Trains both networks in turns.

        Raises:
            ModelError: the output is not one sample of a fixed size per row, or one that no
                discriminator reads.
            ArgumentError: there are no real samples of that form, or no such latents.
        """
        o = self.options
        recipe = Spread(program, context, o, self.id)
        data = as_batches(context.training_data, program.signature)
        if not data.has_labels:
            raise ArgumentError(f"{self.id} needs real samples", where=data.source,
                                fix="Add an array of them named `labels`.")  # fmt: skip
        recipe.refuse(next(labels for _, labels in data.labelled()))
        chosen = chosen_parameters(program, o.targets, self.id)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[*training_hooks(program), recipe])  # fmt: skip
        metrics = metrics_of(tuned.history) | {"last_distance": recipe.last_distance}
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics)


class Spread(InTurns):
    """The steps of the discriminator and of the generator.

    Attributes:
        critic: the discriminator.
        real, made: buffers of embeddings, [buffer, outputs].
        last_distance: mean squared distance from the embeddings of made samples to the nearest
            ones, in the generator's last step.
    """

    counts_steps = True
    counts_on_last_step = False

    def __init__(
        self, program: Program, context: Context, options: ManifoldEntropyOptions, by: str
    ) -> None:
        """
        Args:
            program: the generator.
            context: seed and device.
            options: of the pass.
            by: its id, for messages.
        """
        super().__init__(options.generator_every)
        self.signature, self.options, self.by = program.signature, options, by
        self.latents = latents_of(program, options.latents, by)
        self.shape = shape_made(program, by)
        conditions = [s for s in program.signature.inputs if s.name not in self.latents]
        self.conditions = [spec.name for spec in conditions]
        with drawn_from(context.generator("critic")):
            critic = Critic(self.shape, options.critic.width, 0, conditions, options.outputs)
            bounded(critic)
        self.critic = Player(critic, options.critic, options.tune, context.device)
        g, device = context.generator("buffers"), self.critic.processes.device
        rows = (options.buffer, options.outputs)
        self.real, self.made = ((2 * torch.rand(rows, generator=g) - 1).to(device) for _ in "rm")
        self.last_distance = 0.0

    def refuse(self, labels: Tensor | None) -> None:
        """Raises ArgumentError unless labels are real samples."""
        if labels is None or not labels.is_floating_point() or labels.shape[1:] != self.shape:
            given = "none" if labels is None else f"{list(labels.shape)} {labels.dtype}"
            raise ArgumentError(f"{self.by}: real samples are labels (batch, "
                                f"{', '.join(map(str, self.shape))}) of floating point, and these "
                                f"are {given}")  # fmt: skip

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """New latents."""
        return drawn(batch, self.latents)

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """A step of the discriminator; the generator's loss where it does not rest."""
        output = wide(main_of(self.signature, outputs))
        real = batch["labels"]
        self.refuse(real)
        given = {name: batch[name] for name in self.conditions}
        factor = self.options.entropy * risen(at.step, self.options.entropy_rise * at.total)
        value = self.critic.learn(at, self._judged(real.to(output), output.detach(), given, factor))
        if self.is_at_rest(at):
            return self.resting(value, output)
        with self.critic.fixed() as critic:
            f: Tensor = critic(output, None, given)
        distance = nearest(f, self.made)
        self.last_distance = float(distance.detach())
        self.made = pushed(self.made, f)
        moved: Tensor = loss - f.mean() - factor * log(distance)
        return moved

    def _judged(self, real: Tensor, made: Tensor, given: Values, factor: float) -> Tensor:
        """The discriminator's loss."""
        o = self.options

        def embedded(x: Tensor) -> Tensor:
            f: Tensor = self.critic.network(x, None, given)
            return f

        of_real, of_made = embedded(real), embedded(made)
        loss = of_made.mean() - of_real.mean()
        if o.dlle:
            views = (embedded(view(x, o.flips)) for x in (real, made))
            parts = zip((of_real, of_made), views, strict=True)
            loss = loss + o.dlle * torch.stack([F.mse_loss(f, g.detach()) for f, g in parts]).sum()
        if o.disomap:
            share = torch.randn(len(real), device=real.device, dtype=real.dtype)
            inside = embedded(mixed(real, made, share))
            aim = mixed(of_real, of_made, share.to(of_real))
            loss = loss + o.disomap * isometry(inside, aim, AIM_NOISE)
        distance = nearest(of_real, self.real)
        self.real = pushed(self.real, of_real)
        return loss - factor * log(distance)

    def state_dict(self) -> dict[str, Any]:
        """The discriminator, the buffers, and what the report says."""
        return {"critic": self.critic.state_dict(), "real": self.real, "made": self.made,
                "last_distance": self.last_distance}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self.critic.load_state_dict(state["critic"])
        self.real, self.made = (state[name].to(self.real.device) for name in ("real", "made"))
        self.last_distance = state["last_distance"]


def bounded(critic: nn.Module) -> None:
    """Divides the weight of every layer by its spectral norm, from now on."""
    for module in [*critic.modules()]:
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            spectral_norm(module)


def risen(step: int, total: float) -> float:
    """A factor that rises from 0 to 1 in `total` steps, linearly."""
    return min(1.0, step / total) if total else 1.0


def nearest(f: Tensor, buffer: Tensor) -> Tensor:
    """Mean over samples of the least mean squared difference from a row of the buffer.

    Args:
        f: embeddings [batch, outputs].
        buffer: [rows, outputs].
    """
    with torch.no_grad():
        # exact differences: what is found twice has the distance 0
        index = torch.cdist(f, buffer, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return (f - buffer[index]).square().mean(1).mean()


def log(distance: Tensor) -> Tensor:
    """The logarithm, from `LEAST` on."""
    return distance.clamp(min=LEAST).log()


def pushed(buffer: Tensor, f: Tensor) -> Tensor:
    """The buffer with these embeddings behind, and as many of the oldest ones gone."""
    return torch.cat([buffer, f.detach().to(buffer)])[-len(buffer) :]


def view(x: Tensor, flips: bool) -> Tensor:
    """Samples [batch, ...] with a little noise, mirrored along a drawn axis behind the channels."""
    if flips and x.dim() > 2:
        x = x.flip(int(torch.randint(2, x.dim(), ())))
    return x + VIEW_NOISE * torch.randn_like(x)


def mixed(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """share * a + (1 - share) * b, a share per sample.

    Args:
        a, b: [batch, ...].
        share: [batch].
    """
    c = share.reshape(-1, *[1] * (a.dim() - 1))
    return c * a + (1 - c) * b


def isometry(inside: Tensor, aim: Tensor, noise: float) -> Tensor:
    """Mean squared difference of embeddings of mixes from mixes of embeddings with noise, which
    take no gradient.

    Args:
        inside, aim: [batch, outputs].
        noise: deviation.
    """
    return F.mse_loss(inside, (aim + noise * torch.randn_like(aim)).detach())
