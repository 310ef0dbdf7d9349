"""Images out of a trained classifier alone: P25, with P72's teachers and P12's steps as options.

The images of a batch go down

    cross entropy(model(view(x)), label) + bn_weight * sum of distances from running statistics

so that the model takes them for the classes they are made for, and its batch norms see statistics
like those of the data that it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.causes import innermost
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.digest import digest, tensor_digest
from graphwright.ir.program import Program
from graphwright.ir.synthesis.adjust import adjusted
from graphwright.ir.synthesis.options import SynthesisOptions
from graphwright.ir.synthesis.statistics import Observed, Subject, subject_of
from graphwright.ir.synthesis.steps import Adam, AdaptiveWeight, adaptive_step, cosine
from graphwright.ir.synthesis.views import least_area, view
from graphwright.ir.tune.checkpoint import Checkpoint, make_key
from graphwright.ir.tune.losses import wide

Start = tuple[Tensor, Tensor]
"""Real images (n, channels, height, width) to begin with, and their classes (n,)."""


def synthesize(
    program: Program,
    samples: int,
    options: SynthesisOptions,
    context: Context,
    start: Start | None = None,
) -> tuple[Tensor, Tensor]:
    """Images of a classifier, and the class that each was made for.

    Everything follows from `context`'s seed, the batch and the iteration; `context.work` is where
    unfinished work is kept, so that a killed run goes on with it.

    Args:
        program: in inference or training mode, with its batch norms; left as it is.
        samples: images to make, 2 or more.
        options: how.
        context: seed, device, work folder, progress.
        start: images to begin with, repeated where they are fewer; noise when absent.

    Returns:
        Images (samples, channels, height, width) in the input's dtype, and classes (samples,)
        int64, both on the CPU.

    Raises:
        ModelError: the program lacks what this takes, or the loss is no longer a finite number.
    """
    subject = subject_of(program)
    check_channels(subject, options)
    return _Maker(program, subject, samples, options, context, start).run()


def check_channels(subject: Subject, options: SynthesisOptions) -> None:
    """Raises ModelError where `mean` and `std` are for another number of channels."""
    if options.mean and len(options.mean) != subject.shape[0]:
        raise ModelError(
            f"bn_synthesis: mean has {len(options.mean)} values, and an image of input "
            f"{subject.image.name!r} {subject.shape[0]} channels"
        )


def batch_sizes(samples: int, most: int, fixed: int | None) -> list[int]:
    """Images per batch: as even as can be, or what the program takes."""
    if fixed is not None:
        return [fixed] * math.ceil(samples / fixed)
    count = math.ceil(samples / most)
    return [samples // count + (index < samples % count) for index in range(count)]


def classes_in_turn(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Classes for `count` images: each about as often, in a new order every time through.

    P25 takes 0, 1, 2, ... throughout, by which every batch of a net with many classes matches the
    statistics of a few neighbours; an order of its own for every round does not.
    """
    rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
    return torch.cat(rounds)[:count]


class _Maker:
    def __init__(
        self,
        program: Program,
        subject: Subject,
        samples: int,
        options: SynthesisOptions,
        context: Context,
        start: Start | None,
    ) -> None:
        self.subject, self.samples, self.options = subject, samples, options
        self.context, self.device = context, context.device
        self.observed = Observed(program, subject.norms, context.device)
        self.dtype = getattr(torch, subject.image.dtype)
        self.sizes = batch_sizes(samples, options.batch, subject.batch)
        self.start = start
        self.bounds = self._bounds()
        count = sum(self.sizes)
        turn = classes_in_turn(count, subject.classes, context.generator("classes"))
        self.labels = turn if start is None else start[1][torch.arange(count) % len(start[1])]
        # Without real images, those that the model itself makes are what a batch's own teacher
        # starts from.
        adjusts = options.weight_adjust is not None
        self.rounds = (False, True) if adjusts and start is None else (adjusts,)
        self.total = len(self.sizes) * len(self.rounds) * options.iterations
        self.done: list[Tensor] = []
        self.checkpoint = self._checkpoint(program)

    def run(self) -> tuple[Tensor, Tensor]:
        state = self.checkpoint.load() or {"done": [], "batch": None}
        self.done = list(state["done"])
        unfinished = state["batch"]
        for number in range(len(self.done), len(self.sizes)):
            self.done.append(self._batch(number, unfinished))
            unfinished = None
        self.checkpoint.save({"done": self.done, "batch": None})
        return torch.cat(self.done)[: self.samples], self.labels[: self.samples].clone()

    # ---- a batch

    def _batch(self, number: int, unfinished: dict[str, Any] | None) -> Tensor:
        begin = sum(self.sizes[:number])
        labels = self.labels[begin : begin + self.sizes[number]].to(self.device)
        images = self._first(number, begin)
        for index, adjusts in enumerate(self.rounds):
            if unfinished is not None and unfinished["round"] > index:
                continue
            kept = unfinished
            unfinished = None
            images = kept["start"].to(self.device) if kept is not None else images
            descent = _Descent(self, number, index, images, labels, adjusts=adjusts)
            images = descent.run(kept)
        return images.cpu()

    def _first(self, number: int, begin: int) -> Tensor:
        size = self.sizes[number]
        if self.start is None:
            drawn = torch.randn(
                (size, *self.subject.shape), generator=self.context.generator("noise", number)
            )
            return drawn.to(self.device, self.dtype)
        rows = torch.arange(begin, begin + size) % len(self.start[0])
        return self.start[0][rows].to(self.device, self.dtype)

    def _bounds(self) -> tuple[Tensor, Tensor] | None:
        """Least and largest value per channel, (channels, 1, 1)."""
        options, known = self.options, self.subject.image.range
        if options.mean:
            mean, std = (
                torch.tensor(v, dtype=self.dtype, device=self.device).view(-1, 1, 1)
                for v in (options.mean, options.std)
            )
            return -mean / std, (1 - mean) / std
        if known is None:
            return None
        low, high = (torch.tensor(v, dtype=self.dtype, device=self.device) for v in known)
        return low, high

    # ---- what is kept

    def _checkpoint(self, program: Program) -> Checkpoint:
        context = self.context
        if context.work is None:
            return Checkpoint(None, "", "", math.inf, context.warn)
        key = make_key(
            run=context.key, program=digest(program), seed=context.seed, scope=context.scope,
            samples=self.samples, options=self.options.model_dump(mode="json"),
            start=[] if self.start is None else [tensor_digest(part) for part in self.start],
            torch=torch.__version__,
        )  # fmt: skip
        return Checkpoint(
            context.work, f"images-{key[:12]}", key, context.checkpoint_seconds, context.warn
        )

    def keep(self, state: Mapping[str, Any]) -> None:
        """Keeps an unfinished batch, where enough has been done since the last time."""
        if self.checkpoint.is_due:
            self.checkpoint.save({"done": self.done, "batch": dict(state)})


class _Descent:
    """One batch of images on its way down, with the model or a teacher of its own."""

    def __init__(
        self,
        maker: _Maker,
        number: int,
        index: int,
        images: Tensor,
        labels: Tensor,
        *,
        adjusts: bool,
    ) -> None:
        self.maker, self.options = maker, maker.options
        self.path = (number, index)
        self.first, self.labels = images, labels
        self.images = images.clone()
        self.adam = Adam()
        self.weight = AdaptiveWeight()
        self.parameters: dict[str, Tensor] | None = None
        adjust = self.options.weight_adjust
        if adjusts and adjust is not None:
            drawn = maker.context.generator("adjust", *self.path)
            seen = view(images, self.options.min_area, self.options, drawn)
            self.parameters = adjusted(maker.observed, seen, labels, adjust)

    def run(self, kept: Mapping[str, Any] | None) -> Tensor:
        """The images after all iterations; the last ones, for losses of different views do not
        compare."""
        options, begin = self.options, 0
        if kept is not None:
            begin = kept["iteration"]
            self.images = kept["images"].to(self.images.device)
            self.adam.load_state_dict(kept["adam"], self.images.device)
            self.weight.load_state_dict(kept["weight"], torch.device("cpu"))
        number, index = self.path
        before = (number * len(self.maker.rounds) + index) * options.iterations
        for iteration in range(begin, options.iterations):
            loss = self._step(iteration)
            if iteration % 20 == 0 or iteration + 1 == options.iterations:
                self._look(float(loss), iteration, before)
        return self.images

    def _step(self, iteration: int) -> Tensor:
        options = self.options
        lr = cosine(options.lr, iteration, options.iterations)
        low = least_area(
            options.curriculum, iteration, options.iterations, options.milestone, options.min_area
        )
        generator = self.maker.context.generator("view", *self.path, iteration)
        images = self.images.requires_grad_(True)
        try:
            of_class, of_norms = self._losses(view(images, low, options, generator))
            gradient = self._gradient(images, of_class, of_norms, lr)
        except RuntimeError as error:
            raise ModelError(
                f"bn_synthesis: no gradient comes through the model: {innermost(error)}"
            ) from error
        self.images = images.detach()
        direction = self.adam.direction(gradient)
        if options.step == "adaptive" and iteration > 0:
            steps: Tensor | float = adaptive_step(lr, self._verifier(), direction)
        else:
            steps = lr
        self.images -= steps * direction
        if self.maker.bounds is not None:
            self.images.clamp_(*self.maker.bounds)
        return (of_class + of_norms).detach()

    def _losses(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy, and the weighted distances of all norms."""
        options = self.options
        logits, values = self.maker.observed(seen, self.parameters)
        first, *others = self.maker.observed.distances(values, options.variance_weight)
        distance = options.first_bn * first + sum(others, torch.zeros_like(first))
        return F.cross_entropy(wide(logits), self.labels), options.bn_weight * distance

    def _gradient(self, images: Tensor, of_class: Tensor, of_norms: Tensor, lr: float) -> Tensor:
        if self.options.loss_weight == "fixed":
            (gradient,) = torch.autograd.grad(of_class + of_norms, images)
            return gradient
        (first,) = torch.autograd.grad(of_class, images, retain_graph=True)
        (second,) = torch.autograd.grad(of_norms, images)
        gamma = self.weight.gamma
        self.weight.update(lr, self._verifier(), first, second)
        return gamma * first + (1 - gamma) * second

    def _verifier(self) -> Tensor:
        """Gradient of log p(class) of the whole images by the model itself."""
        images = self.images.detach().requires_grad_(True)
        logits, _ = self.maker.observed(images)
        score = -F.cross_entropy(wide(logits), self.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(score, images)
        return gradient

    def _look(self, loss: float, iteration: int, before: int) -> None:
        if not math.isfinite(loss):
            raise ModelError(
                f"bn_synthesis: the loss is {loss} in iteration {iteration}", fix="Lower `lr`."
            )
        done = before + iteration + 1
        self.maker.context.progress(f"loss {loss:.4g}", done, self.maker.total)
        self.maker.keep(
            {
                "round": self.path[1], "start": self.first.cpu(), "iteration": iteration + 1,
                "images": self.images.cpu(), "adam": self.adam.state_dict(),
                "weight": self.weight.state_dict(),
            }
        )  # fmt: skip


__all__ = ["batch_sizes", "classes_in_turn", "synthesize"]
