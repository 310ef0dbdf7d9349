"""tune.patches: training on patches whose scale is drawn from an annealed distribution."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, TuneOptions, tune
from graphwright.ir.tune.hooks import Values
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of
from graphwright.passes.tune._images.data import image_of
from graphwright.passes.tune._images.patches import annealed, drawn_scales, sampled

Shape = Annotated[float, Field(gt=0)]


class PatchesOptions(Bounded):
    """Options of tune.patches."""

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    resolution: Annotated[int, Field(ge=2)] = 64
    """Height and width of what the network is trained on. The smallest patch has this many pixels
    of the image, and the largest is the whole of it."""

    beta_start: Shape = 0.001
    """Second parameter of the Beta distribution of scales at the beginning: all patches are nearly
    the whole image."""

    beta_end: Shape = 0.8
    """The same at the end: scales of all sizes."""

    rise: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of the steps in which it goes from one to the other, linearly; 10 000 of 25 000
    thousand images in the paper."""

    group: Annotated[int, Field(ge=1)] = 1
    """Samples in a row of a batch that share scale and place."""

    tune: TuneOptions = TuneOptions()
    """Options of training. Labels that are images of the input's size are cut like it."""


class Patches(Pass[PatchesOptions]):
    """Trains a network of images on square patches at random scales, all brought to one small size.

    The scale is s = m + (1 - m) Beta(1, b), with m the patch's resolution over the image's and b
    annealed from `beta_start` to `beta_end`; the place is uniform. Early in training patches show
    the whole image coarsely, later its details too. A step costs what the small size costs,
    whatever the size of the images. Evaluations are of whole images.

    Source: P65 (EpiGRAF), section 3.3, with the values of its released configuration. There a
    generator and a discriminator are trained this way, and the discriminator is told scale and
    place.
    """

    papers = ("P65",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Trains on patches.

        Raises:
            ModelError: the network is none of one image, or its height or width is fixed.
            ArgumentError: the images are not square, or smaller than a patch.
        """
        o = self.options
        name = image_of(program, self.id, "height width").name
        data = as_batches(context.training_data, program.signature)
        schedule = Schedule(name, o.resolution, (o.beta_start, o.beta_end), o.rise, o.group)
        first, labels = next(iter(data.labelled()))
        schedule.refuse(first[name], labels)
        chosen = chosen_parameters(program, o.targets, self.id)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[schedule, *training_hooks(program)])  # fmt: skip
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics_of(tuned.history))


class Schedule(Hook):
    """Makes patches of every batch."""

    counts_on_last_step = False

    def __init__(
        self, name: str, resolution: int, beta: tuple[float, float], rise: float, group: int
    ) -> None:
        """
        Args:
            name: of the image among the inputs.
            resolution: of a patch.
            beta: of the distribution, at the beginning and at the end.
            rise: share of the steps between them.
            group: samples that share a patch.
        """
        self.name, self.resolution, self.beta = name, resolution, beta
        self.rise, self.group = rise, group

    def refuse(self, image: Tensor, labels: Tensor | None) -> None:
        """Raises ArgumentError where a batch cannot be cut."""
        height, width = image.shape[2:]
        if height != width:
            raise ArgumentError(
                f"tune.patches cuts square images, and these are {height} x {width}",
                fix="Cut the training images to squares.",
            )
        if height < self.resolution:
            raise ArgumentError(f"tune.patches: images of {height} pixels have no patches of "
                                f"{self.resolution}", fix="Lower `resolution`.")  # fmt: skip
        if labels is not None and labels.dim() > 2 and labels.shape[2:] != image.shape[2:]:
            raise ArgumentError(f"tune.patches cuts labels like the images of {height} x {width}, "
                                f"and theirs is the shape {list(labels.shape)}")  # fmt: skip

    def on_batch(self, at: Moment, batch: Values) -> Values:
        image, labels = batch[self.name], batch.get("labels")
        self.refuse(image, labels)
        total = round(self.rise * at.total)
        beta = annealed(at.step, total, *self.beta)
        groups = -(-len(image) // self.group)
        scale = drawn_scales(groups, self.resolution / image.shape[-1], beta)
        offset = torch.rand(groups, 2, dtype=torch.float64) * (1 - scale[:, None])
        scale, offset = (x.repeat_interleave(self.group, 0)[: len(image)] for x in (scale, offset))
        cut = {self.name: image}
        if labels is not None and labels.dim() == 4 and labels.is_floating_point():
            cut["labels"] = labels
        made = {name: sampled(x, scale, offset, self.resolution) for name, x in cut.items()}
        return {**batch, **made}
