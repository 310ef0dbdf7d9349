"""tune.negatives: a restorer that treats turned patches and mixed-in noise consistently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, TuneOptions, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, main_output, wide
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of
from graphwright.passes.tune._images.data import image_of, refuse_parts
from graphwright.passes.tune._images.patches import patches, turned

MOST_WINDOWS = 256
"""Windows of noise that are kept."""


class NegativesOptions(Bounded):
    """Options of tune.negatives."""

    rules = (
        Rule("margin", "2 * margin < patch",
             "margin {margin} leaves nothing of a patch of {patch}"),
        Rule("window", "'window' not in given or mix", "window has no part where mix is 0"),
        Rule("variance", "'variance' not in given or mix", "variance has no part where mix is 0"),
    )  # fmt: skip

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    patch: Annotated[int, Field(ge=2)] = 16
    """Pixels on a side of the patches that are turned."""

    rotated: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the patches that are turned, by 90, 180 or 270 degrees alike."""

    margin: Annotated[int, Field(ge=0)] = 2
    """Pixels of the input at the edge of every patch that are not compared: what the network makes
    of them depends on the neighbours."""

    agreement: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the difference between the output for a turned input and the turned output."""

    mix: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the noise in the input; 0 for none. Labels stay as they are."""

    window: Annotated[int, Field(ge=2)] = 64
    """Pixels on a side of the windows of the training images that are taken for noise."""

    variance: Annotated[float, Field(gt=0)] = 50 / 255**2
    """Largest variance of such a window: 50 where pixels go to 255, here for pixels in [0, 1]."""

    tune: TuneOptions = TuneOptions(loss="mse")
    """Options of training; `loss` compares the output with the labels."""


class Negatives(Pass[NegativesOptions]):
    """Trains a restorer with labels on inputs that have real noise mixed in, and lets what it makes
    of an input with turned patches be what it makes of the input, with the patches turned.

    Noise is what flat windows of the training images show (variance at most `variance`, not all
    black); the input is (1 - mix) x + mix noise, where a window is repeated over an image that is
    larger. With T the turns, the loss is tune.loss + agreement * |f(T x) - T f(x)|, a mean over the
    inner pixels of the patches. The network may enlarge images.

    Source: P11 (NegVSR), whose released code has the collection of noise, the mix and the turns.
    The loss was not released: its form and factor are ours, after the abstract. The paper restores
    videos, and adds sequences of noise; here noise is of single images.
    """

    papers = ("P11",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Collects noise, and trains.

        Raises:
            ModelError: the network is no restorer of one image, or makes it smaller.
            ArgumentError: the images are no whole number of patches, or none of them has a flat
                window.
        """
        o = self.options
        name = image_of(program, self.id, "").name
        output = program.signature.outputs[main_output(program.signature)].shape
        if len(output) != 4:
            raise ModelError(f"{self.id} trains restorers, and the output is {list(output)}")
        data = as_batches(context.training_data, program.signature)
        first = next(iter(data))
        refuse_parts(first[name].shape, o.patch, "see `patch`", self.id)
        self._refuse_scale(program, first, name)
        noise = None
        if o.mix:
            noise = flat_windows((batch[name] for batch in data), o.window, o.variance)
            if not len(noise):
                raise ArgumentError(
                    f"{self.id}: no window of {o.window} pixels in the training images has a "
                    f"variance of {o.variance:.3g} or less, to be taken for noise",
                    fix="Raise `variance`, lower `window`, or set `mix: 0`.",
                )
        chosen = chosen_parameters(program, o.targets, self.id)
        recipe = Agreement(program, name, noise, o)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[recipe, *training_hooks(program)])  # fmt: skip
        metrics = metrics_of(tuned.history)
        metrics["noise_windows"] = 0.0 if noise is None else float(len(noise))
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics)

    def _refuse_scale(self, program: Program, batch: Values, name: str) -> None:
        """Raises ModelError unless the output is a whole number of times as large as the image."""
        with torch.no_grad():
            flat = program.run_flat(tuple(batch[spec.name] for spec in program.signature.inputs))
        given, made = batch[name].shape[2:], flat[main_output(program.signature)].shape[2:]
        factors = {b / a for a, b in zip(given, made, strict=True)}
        if len(factors) > 1 or not min(factors).is_integer():
            raise ModelError(
                f"{self.id} compares patches of the output with those of the image, and it makes "
                f"{list(made)} pixels of {list(given)}: no whole number of times as many each way"
            )


class Agreement(Hook):
    """Mixes noise into the batch, runs it with turned patches too, and compares."""

    counts_on_last_step = False

    def __init__(
        self, program: Program, name: str, noise: Tensor | None, options: NegativesOptions
    ) -> None:
        """
        Args:
            program: a restorer.
            name: of the image.
            noise: windows (count, channels, side, side); None for none.
            options: of the pass.
        """
        self.signature, self.name, self.noise, self.options = (
            program.signature, name, noise, options,
        )  # fmt: skip
        self._quarters = torch.empty(0)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        if self.noise is None:
            return batch
        image = batch[self.name]
        drawn = self.noise[torch.randint(len(self.noise), (len(image),))].to(image)
        return {**batch, self.name: mixed(image, drawn, self.options.mix)}

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        """The batch with turned patches."""
        image, side = batch[self.name], self.options.patch
        refuse_parts(image.shape, side, "see `patch`", "tune.negatives")
        shape = (len(image), image.shape[2] // side, image.shape[3] // side)
        is_turned = torch.rand(shape) < self.options.rotated
        self._quarters = (is_turned * torch.randint(1, 4, shape)).to(image.device)
        return [{**batch, self.name: turned(image, self._quarters, side)}]

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        plain, other = (wide(main_of(self.signature, o)) for o in (outputs, at.also[0]))
        factor = plain.shape[-1] // batch[self.name].shape[-1]
        o = self.options
        gap = difference(plain, other, self._quarters, o.patch * factor, o.margin * factor)
        return loss + o.agreement * gap


def difference(plain: Tensor, other: Tensor, quarters: Tensor, side: int, margin: int) -> Tensor:
    """|f(T x) - T f(x)|, a mean over inner pixels.

    Args:
        plain: f(x), (batch, channels, height, width).
        other: f(T x).
        quarters: of the turns, as in `turned`.
        side: of a patch, in pixels of the output.
        margin: pixels at its edge that do not count.
    """
    inner = slice(margin, side - margin)
    wanted, found = (patches(x, side)[..., inner, inner]
                     for x in (turned(plain, quarters, side), other))  # fmt: skip
    return F.l1_loss(found, wanted)


def mixed(image: Tensor, noise: Tensor, share: float) -> Tensor:
    """(1 - share) image + share noise.

    Args:
        image: (batch, channels, height, width).
        noise: (batch, channels, side, side), repeated where it is smaller and cut where larger.
        share: from 0 to 1.
    """
    height, width = image.shape[2:]
    down, right = (-(-size // noise.shape[-1]) for size in (height, width))
    whole = noise.repeat(1, 1, down, right)[:, :, :height, :width]
    return (1 - share) * image + share * whole


def flat_windows(batches: Iterable[Tensor], side: int, variance: float) -> Tensor:
    """Windows of images with a small variance that are not black, the first ones in order.

    The released collector leaves the last window of every row out; this one does not.

    Args:
        batches: images (batch, channels, height, width).
        side: of a window.
        variance: the largest.

    Returns:
        (count, channels, side, side); count is 0 where there is none.
    """
    found: list[Tensor] = []
    count, channels = 0, 1
    for images in batches:
        channels = images.shape[1]
        rows, columns = (size // side * side for size in images.shape[2:])
        parts = patches(images[:, :, :rows, :columns].detach(), side)
        windows = parts.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        flat = windows.flatten(1).double()
        keep = (flat.var(1, correction=0) <= variance) & (flat.mean(1) > 0)
        found.append(windows[keep].cpu())
        count += int(keep.sum())
        if count >= MOST_WINDOWS:
            break
    return torch.cat(found)[:MOST_WINDOWS] if count else torch.zeros(0, channels, side, side)
