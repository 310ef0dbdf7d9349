"""reparameterize.activation_free: gates in the place of activations, and distillation."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from pydantic import Field

from graphwright.ir.data.batches import as_batches
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.features import Features
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.reparameterize._activation_free import (
    find_attention,
    find_gated,
    fitted,
    mean_gates,
    put_attention,
    put_gate,
)

FITTED_ON = 8
"""Batches of the training data that gates are fitted on."""


class ActivationFreeOptions(Bounded):
    """Options of reparameterize.activation_free."""

    targets: Selector = ("*",)
    """Layers whose activation becomes a gate: selector patterns over names and kinds."""

    attention: bool = True
    """Whether channel attention loses its sigmoid, and what makes it, too."""

    feature: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distances to the values behind the activations in the loss."""

    tune: TuneOptions = TuneOptions(loss="teacher_mse", lr=1e-4, clip_norm=1.0)
    """Options of training, by default to follow the program as it was. Products of halves have
    large gradients: keep a bound on their norm."""


class ActivationFree(Pass[ActivationFreeOptions]):
    """Replaces activations by products of two halves, and channel attention by a simple one.

    SimpleGate: a layer in front of an activation becomes twice as wide, and its halves are
    multiplied: z * g. The second half starts as g = a + b z, with a and b of each channel by least
    squares on the activation's own values. Simplified channel attention: x * (R mean(x) + r) in the
    place of x * sigmoid(...), from R = 0 and the mean gate. Then the network is distilled from the
    program as it was: no equivalence is claimed, and `max_error` bounds what is left. Activations
    that no layer is right in front of stay, and are named. A gate grows with the square of its
    input: where many follow each other without a norm between, inputs far beyond the data's range
    overflow, and the check of the pass refuses the result. Norms keep it bounded, as in the paper's
    blocks; else choose fewer `targets`.

    Source: P77 (NAF-DPM), whose blocks are those of Chen et al. 2022, "Simple Baselines for Image
    Restoration", equations 4 (SimpleGate) and 6 (simplified attention). The paper trains from
    random weights; the fit is ours.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    papers = ("P77",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        pools = find_attention(program) if o.attention else []
        data = as_batches(context.training_data, program.signature)
        batches = [dict(batch) for batch in islice(iter(data), FITTED_ON)]
        plain, pairs, actions = program, [], []
        means = mean_gates(program, pools, batches)
        if pools:
            editor = Editor(program, self.id)
            for pool in pools:
                pairs.append((put_attention(editor, pool, means[pool.node]), pool.node))
                actions.append(Action(pool.node, "simplified channel attention"))
            plain = editor.finish()
        gated, left = find_gated(plain, self._chosen(program, plain))
        if not gated and not pools:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:4])
            raise ModelError("no activation can become a gate", fix=reasons or "Widen `targets`.")
        fits = fitted(program, gated, batches)
        editor = Editor(plain, self.id)
        for one in gated:
            pairs.append((put_gate(editor, one, *fits[one.node].solved()), one.node))
            actions.append(Action(one.layer.name, f"{one.node} is a gate"))
        start = editor.finish()
        hook = Features(program, pairs if o.feature else [], output=0.0, feature=o.feature)
        tuned = tune(start, context.training_data, o.tune, context, hooks=[hook], teacher=program)
        actions += [Action.left(name, why) for name, why in left.items()]
        metrics = {
            "gates": float(len(gated)), "attentions": float(len(pools)),
            "first_loss": tuned.history.losses[0], "last_loss": tuned.history.losses[-1],
        }  # fmt: skip
        return Result(tuned.program, tuple(actions), metrics)

    def _chosen(self, program: Program, plain: Program) -> list[Layer]:
        """The selected layers that are left."""
        names = {layer.node.name for layer in select(program, self.options.targets)}
        return [layer for layer in layers(plain) if layer.node.name in names]
