"""tune.blind_spot: a denoiser that learns from noisy images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.insert.blind_spot import MARK
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of
from graphwright.passes.tune._images.data import (
    image_of,
    refuse_other_size,
    refuse_parts,
    whole_cells,
)
from graphwright.passes.tune._images.sub_images import join, pick, random_order, split

CELL = 2
"""Pixels on a side of the cells of which the invariance loss picks one pixel each."""


class BlindSpotOptions(Bounded):
    """Options of tune.blind_spot."""

    rules = (
        Rule("invariance", "'invariance' not in given or loss == 'invariance'",
             "invariance has no part in loss {loss}"),
        Rule("rise", "'rise' not in given or loss == 'invariance'",
             "rise has no part in loss {loss}"),
    )  # fmt: skip

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    loss: Literal["invariance", "cyclic"] = "invariance"
    """`invariance` trains the network blind on sub-images and lets the seeing one, on whole images,
    agree with it (P05); `cyclic` lets every sub-image foretell the next one (P20)."""

    sampler: Literal["grid", "random"] | None = None
    """Which pixel of a cell goes to which sub-image: the one at the same place of every cell
    (`grid`), or a permutation of its own for every cell (`random`). When absent, `grid` for
    invariance and `random` for cyclic, as in the papers."""

    stride: Annotated[int, Field(ge=2)] = 5
    """Pixels on a side of a cell; noise should not reach further. An image has stride^2
    sub-images."""

    invariance: Annotated[float, Field(ge=0)] = 2.0
    """For `invariance`: lambda, the factor of the agreement with the blind network."""

    rise: Annotated[float, Field(ge=0, le=1)] = 0.4
    """For `invariance`: share of the steps in which the losses of the seeing network rise from 0 to
    their full factor; 200 000 of 500 000 in the paper."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=1e-4, schedule="step", step_share=0.2, gamma=0.5)
    """Options of training. The data is noisy images; labels are not looked at."""


class BlindSpot(Pass[BlindSpotOptions]):
    """Trains the blind network of `insert.blind_spot` as a denoiser, with noisy images and no clean
    ones.

    With f the network, D the split into sub-images, and R one random pixel of every 2 x 2 cell,
    `invariance` minimizes

        |D^-1 f_blind(D x) - x| + s (|f(x) - x| + lambda |R f(x) - f_blind(R x)|),

    means of absolute values; s rises from 0 to 1, and the last term lets f alone learn. The result
    is f: the masks are gone, and the kernels have their middle. `cyclic` minimizes the sum over all
    sub-images of |f_blind(x_j) - x_j+1|, the last being followed by the first; the result is
    f_blind, its masks multiplied into the kernels, so that both are plain convolutions. What was
    trained with `cyclic` is meant for images at a smaller scale, as P20 does with four sub-images
    of a picture (`stride` 2) one by one.

    The published code brings patches to mean 0 and variance 1; here images are taken as the data
    gives them, which is how the result wants them too.

    Source: P05, with the means and factors of its released code; P20 for `cyclic`.
    """

    papers = ("P05", "P20")
    contract = "lossy"
    needs = "training"
    behind = ("insert.blind_spot",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Trains, and stores plain kernels.

        Raises:
            ModelError: the network has no masks, is none of one image, or has fixed sizes.
            ArgumentError: the images are no whole number of cells high and wide.
        """
        o = self.options
        masks = {str(mask.target): program.state[str(mask.target)]
                 for _, mask in _masked(program.graph).values()}  # fmt: skip
        if not masks:
            raise ModelError(f"{self.id}: the network has no blind spot",
                             fix="Put `insert.blind_spot` in front.")  # fmt: skip
        name = image_of(program, self.id, "batch height width").name
        refuse_other_size(program, self.id)
        cell = math.lcm(o.stride, CELL) if o.loss == "invariance" else o.stride
        data = whole_cells(context.training_data, program, cell, "see `stride`", self.id)
        chosen = chosen_parameters(program, o.targets, self.id)
        random = (o.sampler or ("random" if o.loss == "cyclic" else "grid")) == "random"
        recipe: Hook
        if o.loss == "invariance":
            recipe = Invariance(program, masks, name, o.stride, random, o.invariance, o.rise)
        else:
            recipe = Cyclic(program, name, o.stride, random)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[recipe, *training_hooks(program)])  # fmt: skip
        result = unmasked(tuned.program, self.id, blind=o.loss == "cyclic")
        return Result(result, tuple(chosen.actions(tuned)), metrics_of(tuned.history))


class Invariance(Hook):
    """P05's loss; runs the network seeing on images and blind on their sub-images."""

    counts_on_last_step = False

    def __init__(
        self,
        program: Program,
        masks: Mapping[str, Tensor],
        name: str,
        stride: int,
        random: bool,
        factor: float,
        rise: float,
    ) -> None:
        """
        Args:
            program: with masks.
            masks: of kernels, by name.
            name: of the image.
            stride: side of a cell.
            random: whether each cell has an order of its own.
            factor: lambda.
            rise: share of the steps in which s rises.
        """
        self.signature, self.name = program.signature, name
        self.open = {mask: torch.ones_like(value) for mask, value in masks.items()}
        self.stride, self.random, self.factor, self.rise = stride, random, factor, rise
        self._runs = 0
        self._order: Tensor | None = None
        self._which = torch.empty(0)

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        image = batch[self.name]
        refuse_parts(image.shape, math.lcm(self.stride, CELL), "see `stride`", "tune.blind_spot")
        self._runs = 0
        self._order = random_order(image, self.stride) if self.random else None
        shape = (len(image), image.shape[2] // CELL, image.shape[3] // CELL)
        self._which = torch.randint(CELL * CELL, shape, device=image.device)
        parts = (split(image, self.stride, self._order), pick(image, CELL, self._which))
        return [{self.name: part} for part in parts]

    def on_parameters(self, at: Moment, values: Values) -> Values:
        """Without masks, but for the runs on sub-images, which are the second and the third."""
        self._runs += at.is_training
        if at.is_training and self._runs in (2, 3):
            return values
        return {**values, **{mask: one.to(_device(values)) for mask, one in self.open.items()}}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        image = wide(batch[self.name])
        seeing, parts, few = (wide(main_of(self.signature, found)) for found in (outputs, *at.also))
        blind = F.l1_loss(join(parts, self.stride, self._order), image)
        own = F.l1_loss(seeing, image)
        agreement = F.l1_loss(pick(seeing, CELL, self._which), few.detach())
        return loss + blind + risen(at, self.rise) * (own + self.factor * agreement)


class Cyclic(Hook):
    """P20's loss, on all sub-images of a batch at once."""

    counts_on_last_step = False

    def __init__(self, program: Program, name: str, stride: int, random: bool) -> None:
        """
        Args:
            program: with masks.
            name: of the image.
            stride: side of a cell.
            random: whether each cell has an order of its own.
        """
        self.signature, self.name, self.stride, self.random = (
            program.signature, name, stride, random,
        )  # fmt: skip

    def on_batch(self, at: Moment, batch: Values) -> Values:
        image = batch[self.name]
        refuse_parts(image.shape, self.stride, "see `stride`", "tune.blind_spot")
        order = random_order(image, self.stride) if self.random else None
        return {self.name: split(image, self.stride, order)}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        parts, count = wide(batch[self.name]), self.stride**2
        return loss + cyclic_loss(wide(main_of(self.signature, outputs)), parts, count)


def cyclic_loss(foretold: Tensor, parts: Tensor, count: int) -> Tensor:
    """sum over j of mean |f(x_j) - x_(j + 1) mod count|.

    Args:
        foretold: (batch * count, ...), f of every sub-image, those of one image in a row.
        parts: the sub-images.
        count: how many an image has.
    """
    following = parts.unflatten(0, (-1, count)).roll(-1, 1).flatten(0, 1)
    return count * F.l1_loss(foretold, following)


def risen(at: Moment, share: float) -> float:
    """s, the step over `share` of all steps, and 1 at most."""
    return min(1.0, at.step / (share * at.total)) if share else 1.0


def unmasked(program: Program, by: str, *, blind: bool) -> Program:
    """The program without nodes for masks.

    Args:
        program: with masks on kernels.
        by: id of the pass.
        blind: whether the kernels lose their middle for good; else they have it.
    """
    editor = Editor(program, by=by)
    for product, (weight, mask) in _masked(editor.graph).items():
        if blind:
            name = str(weight.target)
            kernel = editor.state[name].detach() * editor.state[str(mask.target)]
            editor.set_state(name, nn.Parameter(kernel, editor.state[name].requires_grad))
        editor.replace(product, weight)
    return editor.finish()


def _masked(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """Weight and mask of every masked kernel, by their product."""
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in graph.nodes:
        if gw_meta(node).get(MARK):
            weight, mask = node.args
            found[node] = (weight, mask)
    return found


def _device(values: Values) -> torch.device:
    return next(iter(values.values())).device
