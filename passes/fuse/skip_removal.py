"""fuse.skip_removal: skips fade out while the network is tuned to do without them."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.skips import Skip, find_skips, operands
from graphwright.ir.layers.selectors import layers, select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten

STRENGTH = "skip_strength"


class SkipRemovalOptions(Bounded):
    """Options of fuse.skip_removal."""

    targets: Selector = ("*",)
    """Skips by the last layer that they go past: selector patterns over names and kinds."""

    fade: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of the training steps in which the skips' strength falls from 1 to 0; in the rest they
    are gone."""

    tune: TuneOptions = TuneOptions(loss="teacher_mse", lr=1e-3, epochs=10)
    """Options of training, by default to follow the program as it was."""


class SkipRemoval(Pass[SkipRemovalOptions]):
    """Removes skips that are added, by training: no equivalence is claimed.

    Every selected skip is multiplied by a strength that falls from 1 to 0 in a cosine while the
    network follows the program as it was; then the sums are taken out of the graph. Evaluations
    during training are those of the network without skips. What `fuse.skip` and `fuse.skip_merge`
    can do exactly, they do better; this is for the rest. Nets whose depth lives on skips lose much:
    choose `targets`, and look at the accuracy.

    Source: ours, after the annealed shortcuts that Monti et al. 2018, "Avoiding a Skip-Connection
    Tax", and Li et al. 2020, "Residual Distillation", train with.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        start, joins, actions = self._with_strength(program)
        fading = _Fading(o.fade, start.state[STRENGTH])
        tuned = tune(start, context.training_data, o.tune, context, hooks=[fading], teacher=program)
        editor = Editor(tuned.program, self.id)
        by_name = {node.name: node for node in editor.graph.nodes}
        for join in joins:
            node = by_name[join]
            editor.replace(node, operands(node)[0])
        metrics = {
            "skips_removed": float(len(joins)),
            "first_loss": tuned.history.losses[0], "last_loss": tuned.history.losses[-1],
        }  # fmt: skip
        return Result(editor.finish(), tuple(actions), metrics)

    def _with_strength(self, program: Program) -> tuple[Program, list[str], list[Action]]:
        """The program whose skips have a strength, names of their sums, and what was done."""
        editor = Editor(program, self.id)
        now = program.replace(graph=editor.graph)
        chosen = {layer.node.name for layer in select(now, self.options.targets)}
        names = {layer.node: layer.name for layer in layers(now)}
        joins, actions = [], []
        for skip in find_skips(now):
            if skip.body[-1].name not in chosen:
                continue
            name = f"skip past {names[skip.body[-1]]}"
            if skip.kind == "cat":
                actions.append(Action.left(name, "it is joined to the body's result, not added"))
                continue
            joins.append(_fade(editor, skip).name)
            actions.append(Action(name, "removed"))
        if not joins:
            raise ModelError(
                f"{self.id}: no skip that is added goes past the selected layers",
                fix="Widen `targets`; `graphwright inspect` shows the layers.",
            )
        return editor.finish(), joins, actions


def _fade(editor: Editor, skip: Skip) -> fx.Node:
    """body + strength * skip in the place of the sum; the new sum, the body first."""
    join, dtype = skip.join, skip.join.meta["val"].dtype
    if STRENGTH not in editor.state:
        device = next(iter(editor.program.examples)).device
        editor.add_state(STRENGTH, torch.ones((), dtype=dtype, device=device))
    (end,) = (n for n in operands(join) if n is not skip.source)
    factor = join.kwargs.get("alpha", 1)
    faded: Any = editor.call(
        aten.mul.Tensor, skip.source, editor.get(STRENGTH), before=join, like=join
    )
    swapped = operands(join)[0] is not end
    if factor != 1 and swapped:  # skip + factor * body
        end = editor.call(aten.mul.Tensor, end, factor, before=join, like=join)
    kwargs = {} if swapped else dict(join.kwargs)
    new = editor.call(aten.add.Tensor, end, faded, before=join, like=join, **kwargs)
    editor.replace(join, new)
    return new


class _Fading(Hook):
    """Gives the strength of a step; evaluations are without skips."""

    counts_steps = True

    def __init__(self, share: float, like: Tensor) -> None:
        self.share, self.like = share, like

    def on_parameters(self, at: Moment, values: Values) -> Values:
        done = at.step / max(1.0, self.share * at.total) if at.is_training else 1.0
        strength = torch.tensor(0.5 * (1 + math.cos(min(done, 1.0) * math.pi)))
        return {**values, STRENGTH: strength.to(self.like)}
