"""prune.otov2: trains and compresses at once, so that whole channels end at exact zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.fold import fold
from graphwright.ir.program import Program
from graphwright.ir.tune import tune
from graphwright.ir.work import STRUCTURAL, Load, Work
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.prune._oto.options import Otov2Options
from graphwright.passes.prune._oto.training import (
    ShrinkHook,
    figures,
    find_units,
    remove_zeros,
)
from graphwright.passes.prune._oto.units import Units
from graphwright.passes.prune._units.eligible import gutted

SHORT = 0.05
"""Share of the units by which DHSPG may miss its target without a word."""
WARN_ABOVE = 0.95
"""Share of its units whose loss in a group is a warning: training has seen to the rest."""


class Otov2(Pass[Otov2Options]):
    """Trains under a sparse optimizer that brings zero-invariant groups to zero, and cuts them.

    One run takes a network, trained or not, to a smaller one: no fine-tuning follows. The cut
    changes nothing, because what it removes is zero; the pass checks that on the example inputs.
    Any rule of `tune` moves the weights; the sparse optimizer acts on what it moved them by.

    `hesso` and `hesso_cric` end at floor(sparsity * units) zero units, less what `group_divisible`
    keeps. `dhspg` ends where its projection got to, which `group_sparsity` in the metrics says; it
    wants many steps at a high learning rate, or a larger `penalty` and `epsilon`. `hesso_cric`
    takes 6 steps per group to probe, then up to `max_cycles * sampling_steps`, in which the weights
    are always taken back.

    Units compete over the whole network, so that a layer may be left a single one, which a network
    without a way around that layer cannot do with: `group_divisible` of 4 or 8 keeps that many.

    In your own training loop: `gw.oto(model, example_inputs, optimizer)`.

    Source: Chen et al. 2023, "OTOv2: automatic, generic, user-friendly" (groups, DHSPG); Chen et
    al. 2024, "HESSO: towards automatic efficient and user friendly any neural network training and
    pruning" (HESSO, CRIC). Units are scored by their zero-invariant slices alone, as there. Where
    HESSO's code and OTOv2's paper disagree on a sign, `score_sign` chooses. The defaults of the
    codes prune in a single step; here the lengths follow from the run.
    """

    contract = "lossy"
    weights = "reformed"
    needs = "training"
    computes_in = ("float64", "float32", "bfloat16")  # in float16, updates round to nothing
    papers = ("P46",)
    before = ("cleanup.fold_batch_norm",)  # training wants the norms

    def cost(self, load: Load) -> Work:
        return super().cost(load) + Work(edited=STRUCTURAL * load.nodes)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        folded = fold(program.eval())  # a normalised weight is trained as the weight it makes
        units, actions = find_units(folded, options, folded.trainable())
        hook = ShrinkHook(units, options)
        last = options.tune.model_copy(update={"keep_best": False})
        tuned = tune(folded, context.training_data, last, context, hooks=[hook])
        zero = units.zeros(tuned.program.state)
        smaller, picks, error = remove_zeros(tuned.program, units, zero, options.group_divisible)
        actions += _actions(units, picks, zero, hook)
        losses = tuned.history.losses
        metrics = figures(units, picks) | {
            "cut_error": error, "steps": float(tuned.history.steps),
            "first_loss": losses[0], "last_loss": losses[-1],
        }  # fmt: skip
        if tuned.history.evaluations:
            metrics["last_evaluation"] = tuned.history.evaluations[-1][1]
        return Result(smaller, tuple(actions), metrics, warnings=_warnings(units, picks, options))


def _warnings(
    units: Units, picks: Mapping[ChannelGroup, list[int]], options: Otov2Options
) -> tuple[str, ...]:
    """What the sparsity that was reached says about the run."""
    gone = sum(len(chosen) for chosen in picks.values())
    if gone == 0:
        return (
            f"{options.method} removed nothing: no unit reached zero. Train for more steps or at a "
            "higher learning rate" + (", or raise penalty" if options.method == "dhspg" else ""),
        )
    if options.method == "dhspg" and gone < (options.sparsity - SHORT) * units.count:
        return (f"dhspg removed {gone / units.count:.1%} of the units, where "
                f"{options.sparsity:.1%} were asked for",)  # fmt: skip
    start = {group.name: group.units for group in units.groups}
    return gutted(start, {g.name: len(chosen) for g, chosen in picks.items()}, WARN_ABOVE)


def _actions(
    units: Units, picks: Mapping[ChannelGroup, list[int]], zero: torch.Tensor, hook: ShrinkHook
) -> list[Action]:
    """The report on every group after training."""
    pending = units.by_group((hook.redundant & ~zero).numpy())
    zeros = units.by_group(zero.numpy())
    actions = []
    for group, waiting, none in zip(units.groups, pending, zeros, strict=True):
        gone = len(picks.get(group, ()))
        reasons = []
        if waiting.any():
            reasons.append(f"{int(waiting.sum())} more redundant units did not reach zero")
        if none.sum() > gone:
            reasons.append(f"{int(none.sum()) - gone} zero units stay for its limits")
        if not gone and not reasons:
            reasons.append("its units score higher, or its limits keep them")
        what = f"cut to {group.units - gone} of {group.units} units" if gone else "kept"
        actions.append(Action(group.name, what, "; ".join(reasons), changed=bool(gone)))
    return actions
