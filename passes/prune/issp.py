"""prune.issp: trains a sparse program by iterative soft shrinkage of its smallest weights."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Tuned, TuneOptions, tune
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.prune._masks.layers import share_of_zeros
from graphwright.passes.prune._masks.nm_mask import nm_mask
from graphwright.passes.prune._masks.soft_shrinkage import SoftShrinkage
from graphwright.passes.prune._masks.trainable import bake, keyed, trainable_layers
from graphwright.passes.prune._math.smallest import MOST, below_sampled, count_of, smallest

Size = Annotated[int, Field(ge=1)]

SPARSITY = 0.9
"""Share that is pruned where options name neither a share nor a pattern."""


class IsspOptions(Bounded):
    """Options of prune.issp."""

    rules = (
        Rule("allow_adjust", "pattern is not None or not allow_adjust",
             "allow_adjust belongs to pattern"),
        Rule("sparsity", "pattern is None or sparsity is None",
             "give sparsity or pattern, not both"),
        Rule("sample", "pattern is None or sample is None",
             "sample belongs to sparsity: groups of a pattern have no threshold"),
        Rule("pattern", f"pattern is None or pattern[0] < {MOST} * pattern[1]",
             f"pattern {{pattern[0]}}:{{pattern[1]}} prunes {MOST:.1%} of the weights or more"),
    )  # fmt: skip

    sparsity: Annotated[float, Field(gt=0, lt=MOST)] | None = None
    """Share of every layer's weights that is pruned, the smallest |w|, rounded up; 0.9 when neither
    this nor `pattern` is given."""

    pattern: tuple[Size, Size] | None = None
    """[N, M] prunes N of every M consecutive weights instead, as they are stored: [19, 20] is 95%.
    The paper's code counts so; `prune.nm` counts the weights that stay."""

    allow_adjust: bool = False
    """Whether N and M of `pattern` may both grow until M divides every selected layer. Otherwise
    layers that M does not divide stay dense."""

    rho: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Factor of the smallest weights after every step: that of the published commands; their
    parser's default is 0.99. 0 is iterative hard thresholding (IHT)."""

    shrink: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the steps in which the set is selected anew, and one step more. Then it is frozen,
    its weights are zero, and the rest is fine-tuned. Published: 100,000 of 200,000 steps."""

    sample: Size | None = None
    """Finds a layer's threshold on so many weights, drawn anew in every step, where the layer has
    more (the "fast" variant, published with 32,400). The final mask is exact. Off when absent."""

    targets: Selector = ("*",)
    """Layers to prune: selector patterns over names and kinds. All other parameters train too.
    The paper leaves the first and last layers of SwinIR out, and no layer of EDSR or CAT."""

    tune: TuneOptions = TuneOptions()
    """Options of training. Evaluations measure the program with its smallest weights at zero."""


class Issp(Pass[IsspOptions]):
    """Trains a sparse program by iterative soft shrinkage (ISS-P).

    After every optimizer step the smallest weights of each layer are multiplied by `rho`, a factor
    just below 1, and all others are left as they are. The set is selected anew each time, so a
    weight can leave it and recover. Then the set is frozen at zero and the others go on training.
    Layers are ranked one by one; biases are never touched, nor are the optimizer's moments.

    The method is meant for a freshly initialized model: what the program's weights are is where
    it starts. The paper trains super-resolution with Adam at 2e-4 and an L1 loss. A later pass
    that trains keeps the zeros, unless its `keep_zeros` is off.

    Source: Wang et al. 2023, "Iterative Soft Shrinkage Learning for Efficient Image
    Super-Resolution".
    """

    contract = "lossy"
    needs = "training"
    computes_in = ("float64", "float32", "bfloat16")  # in float16, updates round to nothing
    papers = ("P29",)
    before = ("cleanup.fold_batch_norm",)  # training wants the norms

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        layers, actions = trainable_layers(program, options.targets)
        pattern = options.pattern
        if pattern and options.allow_adjust and layers:
            pattern = _adjusted(pattern, [program.state[layer.weight] for layer in layers])
        kept = []
        for layer in layers:
            reason = _too_small(program.state[layer.weight], options.sparsity, pattern)
            if reason:
                actions.append(Action.left(layer.name, reason))
            else:
                kept.append(layer)
        if not kept:
            raise ModelError(
                f"no selected layer can be pruned: {actions[0].reason}", where=actions[0].layer,
                fix="Choose other `targets`, or set allow_adjust for a pattern.",
            )  # fmt: skip
        names = list(dict.fromkeys(layer.weight for layer in kept))
        pick = _Pick(options, pattern, context)
        hook = SoftShrinkage(names, pick, options.rho, options.shrink)
        tuned = tune(
            program, context.training_data, options.tune, keyed(context, options), hooks=[hook]
        )
        pruned = bake(tuned.program, self.id, hook.masks(tuned.program.state))
        actions += [_action(layer, pruned) for layer in kept]
        return Result(pruned, tuple(actions), _metrics(pruned, tuned, hook))


class _Pick:
    """Selects the entries of a weight that are pruned, as the options say."""

    def __init__(
        self, options: IsspOptions, pattern: tuple[int, int] | None, context: Context
    ) -> None:
        self.share, self.sample = options.sparsity or SPARSITY, options.sample
        self.pattern, self.context = pattern, context

    def __call__(self, name: str, weight: Tensor, step: int | None) -> Tensor:
        if self.pattern is not None:
            n, m = self.pattern
            return ~nm_mask(weight.detach().abs().flatten(), m - n, m).reshape(weight.shape)
        size = weight.numel()
        if step is None or self.sample is None or size <= self.sample:
            return smallest(weight, count_of(self.share, size))
        seed = self.context.generator("sample", name, step).initial_seed()
        drawn = np.random.default_rng(seed).choice(size, self.sample, replace=False, shuffle=False)
        return below_sampled(weight, self.share, torch.from_numpy(drawn).to(weight.device))


def _adjusted(pattern: tuple[int, int], weights: list[Tensor]) -> tuple[int, int]:
    """The pattern with N and M raised by the same number until M divides all sizes.

    Raises:
        ModelError: that comes to whole layers, or to more than `MOST` of them.
    """
    divisor = math.gcd(*(weight.numel() for weight in weights))
    n, m = pattern
    while divisor % m and m < divisor:
        n, m = n + 1, m + 1
    if divisor % m or n >= MOST * m:
        raise ModelError(
            f"pattern {pattern[0]}:{pattern[1]} cannot be adjusted: sizes of the selected layers "
            f"are multiples of {divisor} only",
            fix="Leave small layers out with `targets`.",
        )
    return n, m


def _too_small(weight: Tensor, sparsity: float | None, pattern: tuple[int, int] | None) -> str:
    """The reason why a weight cannot be pruned; empty when it can."""
    if pattern is not None:
        fits = weight.numel() % pattern[1] == 0
        return "" if fits else f"its {weight.numel()} weights do not divide by {pattern[1]}"
    none = count_of(sparsity or SPARSITY, weight.numel()) == 0
    return "its one weight has to stay" if none else ""


def _action(layer: Layer, program: Program) -> Action:
    weight = program.state[layer.weight]
    return Action(layer.name, f"{int((weight == 0).sum())} of {weight.numel()} weights pruned")


def _metrics(program: Program, tuned: Tuned, hook: SoftShrinkage) -> dict[str, float]:
    history, size = tuned.history, sum(program.state[name].numel() for name in hook.names)
    return {
        "steps": float(history.steps),
        "first_loss": history.losses[0],
        "last_loss": history.losses[-1],
        "sparsity": share_of_zeros(program, hook.names),
        "churn": hook.left / max(1, hook.selections) / size,
    }
