"""prune.nm: trains a program to N:M sparsity, with decaying gradient flow to pruned weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Bounded, Rule, Selector, only_with
from graphwright.ir.program import Program
from graphwright.ir.tune import Tuned, TuneOptions, tune
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.prune._masks.layers import share_of_zeros
from graphwright.passes.prune._masks.nm_decay import (
    NmSchedule,
    Pattern,
    densify,
    geometric,
    stepwise,
)
from graphwright.passes.prune._masks.nm_rows import NmRows, nm_rows
from graphwright.passes.prune._masks.nm_training import NmTraining
from graphwright.passes.prune._masks.trainable import bake, keyed, trainable_layers

DECAYS_MASK = ("mask_decay", "combined")
DECAYS_STRUCTURE = ("structure_decay", "combined")

ONLY_WITH: dict[str, tuple[str, ...]] = {
    "pull": ("sr_ste",),
    "decay": DECAYS_MASK,
    "decay_rate": DECAYS_MASK,
    "structure": DECAYS_STRUCTURE,
    "widest": DECAYS_STRUCTURE,
    "patterns": DECAYS_STRUCTURE,
    "grad": ("mask_decay", "structure_decay", "combined"),
    "finetune": ("mask_decay", "structure_decay", "combined"),
}
"""Options that only some methods read."""

Size = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class NmOptions(Bounded):
    """Options of prune.nm."""

    rules = (
        Rule("n", "n < m", "n = {n} keeps all of m = {m}"),
        *(only_with(name, "method", methods) for name, methods in ONLY_WITH.items()),
        only_with("widest", "structure", ["geometric", "densify"]),
        Rule("patterns", "(len(patterns) > 0) == (structure == 'custom')",
             "patterns belong to structure custom, and it needs them"),
        Rule("patterns", "all(kept <= of for kept, of in patterns)",
             "one of the patterns {patterns} keeps more than there are"),
        Rule("patterns", "not patterns or patterns[-1] == [n, m]",
             "the last of patterns is not {n}:{m}"),
        Rule("dense", "dense + finetune < 1",
             "dense and finetune leave no step for the schedule"),
    )  # fmt: skip

    n: Size = 2
    """Weights that every group keeps, the largest; less than `m`."""

    m: Annotated[int, Field(ge=2)] = 4
    """Consecutive weights of a group. It has to divide a layer's rows: its input channels, and
    for convolutions input channels times kernel positions."""

    method: Literal["mask_decay", "structure_decay", "combined", "sr_ste", "ste"] = "mask_decay"
    """`mask_decay` (MdGf) lets the value of pruned weights fall from 1 to 0; `structure_decay`
    (SdGf) goes through a schedule of patterns to N:M; `combined` does both; `sr_ste` and `ste` are
    the straight-through baselines, with N:M from the first masked step."""

    decay: Literal["exponential", "linear"] = "exponential"
    """Course of the mask value: exp(-c t) or max(0, 1 - c t), t steps into the masked phase."""

    decay_rate: Annotated[float, Field(gt=0)] | None = None
    """The c of `decay`, per step. When absent it follows the run: over the T steps between the
    dense and the last phase the exponential falls to e^-10 (c = 10 / T), the line to 0 (c = 1 / T).
    The published configurations have 1e-4 and 2e-4, for tens of thousands of steps. The metric
    `mask_value_at_end` says where it ended."""

    structure: Literal["stepwise", "geometric", "densify", "custom"] = "stepwise"
    """Patterns before N:M: `stepwise` (M-1):M, M/2:M, M/4:M and so on; `geometric` kN:kM for k =
    `widest`, halved down to 1; `densify` N:kM likewise; `custom` those of `patterns`."""

    widest: Literal[2, 4, 8, 16, 32] = 8
    """First k of `geometric` and `densify`; k times `m` has to divide the rows. The published code
    starts at 8, the paper's text at 16."""

    patterns: tuple[tuple[Size, Size], ...] = ()
    """For `custom`: [N, M] pairs in order, the last one [`n`, `m`]; they share the steps between
    the dense phase and the fine-tuning equally."""

    grad: Literal["masked", "ste"] = "masked"
    """Gradient of a weight whose mask value is b: `masked` is the chain rule, b times that of the
    kept ones, as the paper says; `ste` passes it on unscaled, as its published code does."""

    pull: Annotated[float, Field(ge=0)] = 2e-4
    """Lambda of `sr_ste`: the gradient becomes g + lambda (1-mask) W."""

    dense: Share = 0.0
    """Share of the steps that train without a mask, at the begin."""

    finetune: Share = 0.1
    """Share of the steps that train under the final, binary mask, at the end. (The published
    configuration has none, because its mask value has decayed to e^-11 by then.)"""

    sparse_dim: Literal["input", "output"] = "input"
    """Channels that groups run along. Kernels are permuted to (out, height, width, in) first."""

    targets: Selector = ("*",)
    """Layers to prune: selector patterns over names and kinds. All other parameters train too.
    The papers leave classifiers and embeddings out."""

    tune: TuneOptions = TuneOptions()
    """Options of training. Evaluations measure the program under its final N:M masks."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.schedule()
        return self

    def frames(self) -> tuple[Pattern, ...]:
        """Patterns that training goes through.

        Raises:
            ValueError: `stepwise` cannot halve M down to N.
        """
        if self.method not in DECAYS_STRUCTURE:
            return ((self.n, self.m),)
        if self.structure == "custom":
            return self.patterns
        if self.structure == "stepwise":
            return stepwise(self.n, self.m)
        widen = geometric if self.structure == "geometric" else densify
        return widen(self.n, self.m, self.widest)

    def schedule(self) -> NmSchedule:
        """Pattern and mask value of every step."""
        decay = self.decay if self.method in DECAYS_MASK else None
        return NmSchedule(self.frames(), decay, self.decay_rate, self.dense, self.finetune)


class Nm(Pass[NmOptions]):
    """Trains weights to N:M sparsity: of every M consecutive ones, N stay.

    Every forward pass finds the mask Mk of the N largest |W| anew and uses W (Mk + (1-Mk) b). The
    decaying methods bring the sparsity in progressively: the value b of pruned weights falls from
    1 (dense) to 0, or the pattern tightens; in a last phase the mask is binary. The result holds
    W Mk with exact zeros, N:M in every layer it names. Biases are never masked.

    It trains the program from the weights it has; for training from scratch give it a fresh
    model. The paper trains with `tune: {optimizer: adamw, lr: 1e-3, weight_decay: 0.01,
    clip_norm: 1.0}`. A later pass that trains keeps the zeros, unless its `keep_zeros` is off.

    Source: Bambhaniya et al. 2024, "Progressive Gradient Flow for Robust N:M Sparsity Training in
    Transformers" (MdGf, SdGf); Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse
    Neural Networks From Scratch" (SR-STE).
    """

    contract = "lossy"
    needs = "training"
    computes_in = ("float64", "float32", "bfloat16")  # in float16, updates round to nothing
    papers = ("P40",)
    before = ("cleanup.fold_batch_norm",)  # training wants the norms

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        schedule = options.schedule()
        layers, actions = trainable_layers(program, options.targets)
        rows, kept, refused = _rows(program, layers, options.sparse_dim, schedule.widest)
        actions += refused
        if not rows:
            first = actions[0]
            raise ModelError(
                f"no selected layer can be pruned to {options.n}:{options.m}: {first.reason}",
                where=first.layer,
                fix="Choose an `m` that divides the rows, or other `targets`.",
            )
        grad = "ste" if options.method in ("ste", "sr_ste") else options.grad
        pull = options.pull if options.method == "sr_ste" else 0.0
        hook = NmTraining(rows, schedule, grad, pull, options.tune.accumulate)
        tuned = tune(
            program, context.training_data, options.tune, keyed(context, options), hooks=[hook]
        )
        pruned = bake(tuned.program, self.id, hook.masks(tuned.program.state))
        pattern = f"{options.n}:{options.m} along the {options.sparse_dim} channels"
        actions += [Action(layer.name, pattern) for layer in kept]
        return Result(pruned, tuple(actions), _metrics(pruned, tuned, hook))


def _rows(
    program: Program, layers: Sequence[Layer], along: str, m: int
) -> tuple[dict[str, NmRows], list[Layer], list[Action]]:
    """Layout by weight name, the layers that groups of `m` divide, and reasons of the others."""
    found: dict[str, NmRows] = {}
    kept, refused = [], []
    for layer in layers:
        rows = nm_rows(layer, program.state[layer.weight], along)
        if rows.length % m:
            reason = f"its {rows.length} weights per {along} row do not divide into groups of {m}"
            refused.append(Action.left(layer.name, reason))
        else:
            found[layer.weight] = rows
            kept.append(layer)
    return found, kept, refused


def _metrics(program: Program, tuned: Tuned, hook: NmTraining) -> dict[str, float]:
    history = tuned.history
    return {
        "steps": float(history.steps),
        "first_loss": history.losses[0],
        "last_loss": history.losses[-1],
        "sparsity": share_of_zeros(program, list(hook.rows)),
        "mask_value_at_end": hook.schedule.value_at_end(history.steps, hook.total),
    }
