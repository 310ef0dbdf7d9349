"""prune.mfac: optimal brain surgeon with the empirical Fisher, never formed."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.tune.fisher import Fisher
from graphwright.ir.work import BACKWARD, FORWARD, Load, Work
from graphwright.passes.base import MATRICES, Action, Context, Pass, Result
from graphwright.passes.prune._masks.layers import maskable, share_of_zeros, with_weights
from graphwright.passes.prune._masks.patterns import Pattern, SparsityOptions
from graphwright.passes.prune._math.obs import Structure, Vector, kept_after, surgery
from graphwright.passes.prune._units.gradients import Draws, LossName, gradients, room


class MfacOptions(SparsityOptions):
    """Options of prune.mfac."""

    rules = (
        Rule("block_size",
             "block_size is None or pattern == 'unstructured' "
             "or block_size % int(pattern.replace('x', ':').split(':')[1]) == 0",
             "block_size {block_size} is no multiple of the weights that {pattern} keeps together"),
    )  # fmt: skip

    pattern: Annotated[
        str, Field(pattern=r"^(unstructured|[1-9][0-9]*:[1-9][0-9]*|1x[1-9][0-9]*)$")
    ] = "unstructured"
    """Allowed places of zeros: `unstructured`, anywhere; `N:M` such as `2:4`, N of every M
    consecutive weights along a layer's inputs stay; `1xB` such as `1x4`, B consecutive weights
    along the inputs go or stay together."""

    steps: Annotated[int, Field(ge=1)] = 16
    """Sub-steps, each with gradients of its own; every one removes the same share of what is
    left."""

    gradients: Annotated[int, Field(ge=1)] = 64
    """Mini-batch gradients that a Fisher matrix is made of; fewer where there are fewer samples."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples of a mini-batch at most; fewer where the data is not enough for all gradients."""

    block_size: Annotated[int, Field(ge=1)] | None = 128
    """Length of the blocks that the Fisher matrix is restricted to; the full matrix when null."""

    damp: Annotated[float, Field(gt=0)] = 1e-5
    """Number added to the diagonal of the Fisher matrix."""

    loss: LossName = "auto"
    """Loss whose gradients they are: `cross_entropy` with the labels in the data, `next_token` of a
    language model, `energy` (mean square of the outputs), `projection` (their product with random
    numbers); `auto` is the first where there are labels, and else `energy`."""

    def structure(self) -> Structure:
        """The unit of removal."""
        if self.pattern.startswith("1x"):
            return Structure(block=int(self.pattern[2:]))
        pattern = Pattern.parse(self.pattern, self.sparsity)
        return Structure(pattern.n, pattern.m)

    def wanted(self) -> Pattern:
        """The share of zeros, with what a row's length has to be a multiple of."""
        if self.pattern.startswith("1x"):
            share = 0.5 if self.sparsity is None else self.sparsity
            return Pattern(share, 0, int(self.pattern[2:]))
        return Pattern.parse(self.pattern, self.sparsity)


class Mfac(Pass[MfacOptions]):
    """Removes the weights that cost least by the inverse empirical Fisher, and moves the others.

    All selected layers compete: the lowest w^2 / (2 [F^-1]_kk) go, and the rest takes the optimal
    step for them, w + F^-1 u. F is that of mini-batch gradients over the weights that are kept. It
    is never formed (M-FAC's recursion), so that time and memory are linear in the weights. Removed
    weights are exact zeros of the stored tensors. Needs a model in inference mode and data it was
    trained on, with labels for anything but `next_token` and `energy`.

    Source: Frantar, Kurtic, Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of
    Second-Order Information", static algorithm; defaults of their code.
    """

    contract = "lossy"
    takes = MATRICES
    needs = "calibration"
    papers = ("P66",)

    def cost(self, load: Load) -> Work:
        whole = load.calibration
        if whole is None:
            return super().cost(load)
        seen = self.options.gradients * self.options.batch_size / max(whole.samples, 1)
        return super().cost(load) + load.forward(whole).times(seen * (FORWARD + BACKWARD))

    def run(self, program: Program, context: Context) -> Result:
        o: MfacOptions = self.options
        layers, actions = maskable(program, o.targets, o.wanted())
        vector, structure = Vector.of(program, layers), o.structure()
        weights = vector.flat(program.state).double()
        kept = _kept(weights, structure.block)
        before = int(kept.sum())
        target = _target(o, kept, structure)
        draws = Draws(context.batches, program.signature, o.gradients, o.batch_size)
        increase, silent = 0.0, torch.ones(len(weights), dtype=torch.bool)
        steps = o.steps if target < before else 0
        for step in range(1, steps + 1):
            left = kept_after(before, target, step, o.steps)
            left -= left % structure.block
            current = program.replace(state=_state(program, vector, weights))
            batches = draws.draw(context.generator("gradients", step))
            with room(draws.count, int(kept.sum()), context.work) as buffer:
                for row, found in enumerate(gradients(current, batches, o.loss, vector.geometries)):
                    flat = vector.flat(found)
                    silent &= (flat == 0).cpu()
                    buffer[row] = flat[kept]
                fisher = Fisher(buffer, o.damp, o.block_size)
                weights, kept, cost = surgery(weights, kept, fisher, structure, left)
            increase += cost
            context.progress("pruning", step, o.steps)
        result = with_weights(program, self.id, vector.weights(weights)) if steps else program
        actions += _actions(result, layers, vector, silent, bool(steps))
        metrics = {"sparsity": share_of_zeros(result, list(vector.geometries)),
                   "gradients": float(draws.count), "batch_size": float(draws.size),
                   "predicted_loss_increase": increase}  # fmt: skip
        return Result(result, tuple(actions), metrics)


def _kept(weights: Tensor, block: int) -> Tensor:
    """Flags of what is not zero; a block is kept whole."""
    return (weights.reshape(-1, block) != 0).any(1).repeat_interleave(block)


def _target(options: MfacOptions, kept: Tensor, structure: Structure) -> int:
    """Weights that stay: a share rounded up, in whole blocks; at most n of every group of m."""
    if structure.m:
        return int(kept.reshape(-1, structure.m).sum(1).clamp(max=structure.n).sum())
    sets = len(kept) // structure.block
    return (sets - options.wanted().count(sets)) * structure.block


def _state(program: Program, vector: Vector, weights: Tensor) -> dict[str, Tensor]:
    new = {name: value.to(program.state[name].dtype)
           for name, value in vector.weights(weights).items()}  # fmt: skip
    return {**program.state, **{name: torch.nn.Parameter(value) for name, value in new.items()}}


def _actions(
    result: Program, layers: list[Layer], vector: Vector, silent: Tensor, pruned: bool
) -> list[Action]:
    parts = zip(vector.geometries, silent.split(vector.sizes), strict=True)
    quiet = {name: bool(part.all()) for name, part in parts}
    actions = []
    for layer in layers:
        if not pruned:
            actions.append(Action.left(layer.name, "it has as many zeros as asked for"))
            continue
        share = share_of_zeros(result, [layer.weight])
        reason = "no gradient reaches it: it was scored by magnitude" if quiet[layer.weight] else ""
        actions.append(Action(layer.name, f"{share:.1%} zeros", reason))
    return actions
