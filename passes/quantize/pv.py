"""quantize.pv: trains a quantized program, its codes included."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import owner_of
from graphwright.ir.stored.read import is_coded
from graphwright.ir.stored.representation import Representation
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.quantize._math.pv import PvHook, PvSettings, Weight

Beta = Annotated[float, Field(ge=0, lt=1)]

RECIPE: dict[str, Any] = {
    "loss": "kl", "lr": 3e-4, "betas": (0.90, 0.95), "optimizer": "adam", "schedule": "constant",
}  # fmt: skip
"""The training of the released code."""


class PvOptions(Bounded):
    """Options of quantize.pv."""

    code_lr: Annotated[float, Field(ge=0)] = 1e-2
    """Step of the buffers that codes are chosen from; with `lamb`, as a share of the weight's norm.
    It follows the schedule of `tune.lr`."""

    max_change: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of all code groups that may change in a step: those whose buffers have moved farthest.
    1 is plain straight-through training."""

    trust: Annotated[float, Field(gt=0)] | None = None
    """Largest ||change|| / ||weight|| that codes may make in a step, one group more always being
    allowed; no bound when absent."""

    decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the buffer that is set back to the weight after every step: 0 collects steps until
    a code changes, 1 takes every step from the weight as it is."""

    lamb: bool = True
    """Steps are shares of the norm of what they move."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the moments of scales and codebooks."""

    code_betas: tuple[Beta, Beta] = (0.0, 0.95)
    """Decay rates of the moments of the buffers; momentum on codes does harm."""

    codes: bool = True
    """Train codes."""

    continuous: bool = True
    """Train scales, codebooks and low-rank parts."""

    rest: bool = True
    """Train what is not quantized: biases, norms."""

    targets: Selector = ("*",)
    """Quantized layers to train: selector patterns over names and kinds."""

    tune: TuneOptions = TuneOptions(**RECIPE)
    """Options of training. `lr` is that of scales, codebooks and what is not quantized (with
    `lamb`, a share of their norm); with another `optimizer`, or with `weight_decay`, what is not
    quantized moves by that rule. What is not given is as in the released code: kl, Adam at a
    constant rate of 3e-4."""


class Pv(Pass[PvOptions]):
    """Trains a quantized program end to end to follow the original, codes included.

    Every step has two halves. P: scales, codebooks and whatever is not quantized move by their
    gradients, codes fixed. V: a float buffer of every weight takes a step of its own; the few code
    groups whose buffers have moved farthest from the weight are encoded anew, to the nearest value
    that scales and codebooks allow; all others stay. Changing few groups is what keeps the
    gradient's promise: with all of them (`max_change: 1`) this is straight-through training, which
    at a constant rate never settles. Under a schedule that falls to zero the two are close.

    Works on any weight that is rebuilt from codes: blocks, NF4 and FP4, codebooks with residuals
    and outliers (two added codebooks by a beam search), int8, with low-rank corrections. Zero
    points and quantized scales stay.

    Source: Malinovskii et al. 2024, "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
    Compression", algorithms 1 and 2; steps and defaults as in the released code (LAMB, its bias
    correction outside the trust ratio), which keeps the buffers across steps.
    """

    contract = "lossy"
    stores_weights = True
    needs = "training"
    computes_in = ("float64", "float32", "bfloat16")  # in float16, updates round to nothing
    papers = ("P50",)
    after = ("cleanup.*", "quantize.*", "compensate.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        chosen = select(program, options.targets)
        coded = [layer for layer in chosen if layer.weight == "" and is_coded(weight_node(layer))]
        actions = [Action.left(layer.name, "its weight is not made of codes")
                   for layer in chosen if layer not in coded]  # fmt: skip
        if not coded:
            raise ModelError(
                f"{self.id}: no selected layer has a weight made of codes",
                fix="Put a pass that quantizes weights before it.",
            )
        weights, twin, owners = self._apart(program, coded)
        names = set(weights)
        if options.rest:
            names |= {n for n in twin.trainable() if n not in weights}
        how = options.tune
        is_released = how.optimizer == RECIPE["optimizer"] and not how.weight_decay
        hook = PvHook(weights, how.lr, _settings(options) if is_released else None)
        rest = names - set(weights)  # in a coded weight a zero is a code, and no mask
        tuned = tune(
            twin, context.training_data, how, context, hooks=[hook], names=names, masked=rest
        )
        result = _together(program, tuned.program, weights)
        for layer in coded:
            weight = weights[owners[weight_node(layer)]]
            what = f"trained, {weight.codes_changed():.1%} of its bytes of codes changed"
            actions.append(Action(layer.name, what))
        metrics = {
            "steps": float(tuned.history.steps),
            "first_loss": tuned.history.losses[0],
            "last_loss": tuned.history.losses[-1],
            "codes_changed": sum(w.codes_changed() for w in weights.values()) / len(weights),
            "largest_change": max(w.largest_change for w in weights.values()),
        }
        if tuned.history.best_step is not None:
            metrics["best_step"] = float(tuned.history.best_step)
        return Result(result, tuple(actions), metrics)

    def _apart(
        self, program: Program, coded: list[Layer]
    ) -> tuple[dict[str, Weight], Program, dict[fx.Node, str]]:
        """The program with its coded weights as plain parameters, and what these stand for."""
        settings = _settings(self.options)
        editor = Editor(program, by=self.id)
        here = {node.name: node for node in editor.graph.nodes}
        weights: dict[str, Weight] = {}
        owners: dict[fx.Node, str] = {}
        for layer in coded:
            node = weight_node(layer)
            if node in owners:
                continue
            weight = Weight(Representation(program, node), settings)
            dense = torch.nn.Parameter(weight.buffer.to(node.meta["val"].dtype))
            name = editor.add_state(f"{owner_of(layer, node)}_rebuilt", dense)
            owners[node] = name
            weights[name] = weight
            editor.replace(here[node.name], editor.get(name))
        return weights, editor.finish(), owners


def _settings(o: PvOptions) -> PvSettings:
    return PvSettings(o.betas, o.code_lr, o.code_betas, o.lamb, o.max_change, o.trust,
                      o.decay, o.codes, o.continuous)  # fmt: skip


def _together(program: Program, tuned: Program, weights: dict[str, Weight]) -> Program:
    """The program with the trained codes, scales, and everything else that was trained."""
    state: dict[str, Any] = dict(program.state)
    for name in state:
        if name in tuned.state:
            state[name] = tuned.state[name]
    for weight in weights.values():
        state.update(weight.rep.codes)
        for name, tensor in weight.rep.continuous.items():
            old = program.state[name]
            value = tensor.to(old.dtype)
            is_parameter = isinstance(old, torch.nn.Parameter)
            state[name] = torch.nn.Parameter(value, old.requires_grad) if is_parameter else value
    return program.replace(state=state)
