"""tune.mmd: a denoiser finetuned for a few steps, by the distance of its samples from the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.archive import load_program
from graphwright.ir.graph.device import set_device
from graphwright.ir.graph.nodes import copy_graph
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.training import Levels, Recipe, Training, said
from graphwright.ir.signature import rebuild
from graphwright.ir.tune import Moment, OwnLoss, tune
from graphwright.ir.tune.features import reading
from graphwright.ir.tune.hooks import Values
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._denoisers.base import DenoiserRecipe, course
from graphwright.passes.tune._denoisers.discrepancy import Kernel, mmd2

FEW = 5
"""Steps where nothing else is said."""

Features = Callable[[Tensor], Tensor]
"""Samples [batch, ...] to features [batch, features] in float64; gradients flow through."""


class MmdOptions(Options):
    """Options of tune.mmd."""

    rules = (
        Rule("layer", "layer is None or features is not None",
             "layer names a place in the network of `features`, and none is given"),
        Rule("unit", "features is not None or unit", "unit has no part without `features`"),
    )  # fmt: skip

    steps: Annotated[int, Field(ge=1)] | None = None
    """Steps that it is finetuned for; those that the denoiser was trained for, or 5, when absent.
    The paper has 5 to 20."""

    grid: Grid | None = None
    """Their levels; the denoiser's own when absent. (The paper's are uniform: `{spacing: leading}`
    on a table.)"""

    features: str | None = None
    """A program in a `.pt2` file, of one input, whose values samples are compared by; the samples
    themselves when absent. Relative to the spec's folder."""

    layer: str | None = None
    """Layer of it whose input is taken; its main output when absent."""

    unit: bool = True
    """Whether it is given samples moved from [-1, 1] to [0, 1] and cut there, as image networks
    are."""

    kernel: Kernel = "cubic"
    """The kernel: (u v / features + 1)^3, u v, or exp(-|u - v|^2 / features)."""

    recompute: bool = True
    """Whether the backward pass computes every step anew, with the memory of one call."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=5e-6, schedule="constant", clip_norm=0.5)
    """Options of training. The batch is the size of both sets: large is better."""


class Mmd(DenoiserRecipe[MmdOptions]):
    """Finetunes a denoiser for a given number of DDIM steps, through all of them.

    Every step of training samples a batch, and lowers the unbiased estimate of the squared maximum
    mean discrepancy between features of it and of as many real samples under the same conditions.
    Gradients go through the whole trajectory. The result says in its record which steps it is for;
    in others it may be worse than it was. Dropout is active in training, as in the paper's code.

    A distance that is measured by the features it was trained on flatters: measure by others.

    Source: P16 (Aiello et al. 2023, "Fast inference in denoising diffusion models via MMD
    finetuning"), algorithm 1, with its learning rate, kernel and clipping.
    """

    papers = ("P16",)

    def run(self, program: Program, context: Context) -> Result:
        """Trains through the trajectory.

        Raises:
            ModelError: no denoiser of one row per sample, or adapters that act on training.
            ArgumentError: no such grid, file or layer, or batches of one sample.
        """
        o = self.options
        training = Training(program, self.id)
        steps, grid = self._steps(training)
        path = training.path(grid, steps)
        if training_hooks(program):
            raise ModelError(f"{self.id}: adapters of this program act on its training, and steps "
                             "behind the first would be without them",
                             fix="Put adapt.merge in front.")  # fmt: skip
        hook = Unrolled(training, context, path, self._features(context), o.kernel, o.recompute)
        data = training.data(context.training_data)
        rows = len(next(iter(data))[training.record.sample])
        if rows < 2:
            raise ArgumentError(
                f"{self.id}: the estimate takes 2 samples or more in a batch, and there is {rows}",
                fix="Raise the data's batch_size.",
            )
        tuned = tune(program, data, o.tune, context, hooks=[hook])
        made = training.sampled_in(tuned.program, steps, grid)
        action = Action("network", f"finetuned for {steps} steps of ddim")
        return Result(made, (action,), course(tuned.history))

    def _steps(self, training: Training) -> tuple[int, Grid]:
        o, record = self.options, training.record
        if record.steps is not None and record.solver not in ("ddim", "euler"):
            raise ArgumentError(f"{self.id}: this denoiser is sampled by {record.solver}, and what "
                                "is trained here are steps of ddim")  # fmt: skip
        return o.steps or record.steps or FEW, o.grid or record.default_grid

    def _features(self, context: Context) -> Features:
        o = self.options
        if o.features is None:
            return lambda x: x.flatten(1).double()
        network = load_program(context.folder / o.features)
        if len(network.signature.inputs) != 1:
            raise ArgumentError(f"features are of a network of one input, and {o.features} has "
                                f"{len(network.signature.inputs)}")  # fmt: skip
        return features_of(network, o.layer, unit=o.unit)


def features_of(network: Program, layer: str | None, *, unit: bool) -> Features:
    """Features by a network.

    Args:
        network: of one input.
        layer: its layer whose input is taken; its first output when None.
        unit: samples are moved from [-1, 1] to [0, 1] and cut there first.

    Raises:
        ArgumentError: there is no such layer.
    """
    nodes = {found.name: found.node for found in layers(network)}
    if layer is not None and layer not in nodes:
        raise ArgumentError(f"the network of features has no layer {layer!r}, but {list(nodes)}")
    source: Any = None if layer is None else nodes[layer].all_input_nodes[0]
    read = reading(network.eval(), [] if source is None else [source.name])

    def features(x: Tensor) -> Tensor:
        found = read(((x + 1) / 2).clamp(0, 1) if unit else x)[0]
        value: Tensor = found[0] if isinstance(found, tuple) else found
        return value.flatten(1).double()

    return features


class Unrolled(Recipe):
    """The whole trajectory, and the discrepancy of what is at its end."""

    def __init__(
        self, training: Training, context: Context, path: Path, features: Features,
        kernel: Kernel, recompute: bool,
    ) -> None:  # fmt: skip
        """Takes the trajectory and what samples are compared by."""
        super().__init__(training, context)
        self.path, self.features, self.kernel = path, features, kernel
        self.recompute = recompute
        self.module = _module(training.program, context.device)

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """Noise at the first level, under the conditions of the batch."""
        g, asked = self.generator(at), self.training
        real = batch[asked.record.sample]
        noise = torch.randn(real.shape, generator=g).to(real)
        numbers = {n: t.to(real.device) for n, t in asked.numbers(len(real), g).items()}
        x = asked.start(noise, self.path.levels[0])
        given = asked.conditions(batch) | numbers
        return {**batch, **self._inputs(x, 0, given), "real": real}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """The rest of the trajectory, and MMD^2 at its end."""
        given = {n: t for n, t in batch.items() if n in self._numbers | set(self._conditions)}
        x = self._levels(1, len(batch["real"])).ahead(said(outputs))
        for i in range(1, self.path.steps):
            x = self._levels(i + 1, len(x)).ahead(self._ask(at, self._inputs(x, i, given)))
        with torch.no_grad():
            real = self.features(batch["real"])
        return loss + mmd2(self.features(x), real, self.kernel)

    @property
    def _conditions(self) -> list[str]:
        return list(self.training.record.conditions)

    @property
    def _numbers(self) -> set[str]:
        guidance = self.training.record.guidance
        return set() if guidance is None else set(guidance.parameters)

    def _levels(self, i: int, rows: int) -> Levels:
        return Levels.of([self.path.levels[i]] * rows, self.context.device)

    def _inputs(self, x: Tensor, i: int, given: Values) -> dict[str, Tensor]:
        return self.training.inputs(x, self._levels(i, len(x)), given)

    def _ask(self, at: Moment, given: Values) -> Prediction:
        """One more call of the network in training."""
        signature = self.training.program.signature
        inputs = tuple(given[spec.name] for spec in signature.inputs)
        values: dict[str, Tensor] = dict(at.parameters)

        def call(*given: Tensor) -> Any:
            return functional_call(self.module, values, given)

        run: Any = partial(checkpoint, call, use_reentrant=False) if self.recompute else call
        flat = run(*inputs)
        return said(rebuild(signature.structure, flat))


def _module(program: Program, device: torch.device) -> nn.Module:
    """The program in training mode, whose parameters are given with every call."""
    made = program.train()
    graph: Any = copy_graph(made.graph)
    set_device(graph, device)
    state = {name: tensor.detach().to(device, copy=True) for name, tensor in made.state.items()}
    return fx.GraphModule(state, graph, class_name="Unrolled")
