"""adapt.lora_sb: a small core between the singular directions of the first full step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.passes.adapt._form.core import add_core, with_core
from graphwright.passes.adapt._form.low_rank import RankOptions, RankPass, groups_of, rank_of
from graphwright.passes.adapt._form.residual import weight_matrix
from graphwright.passes.adapt._math.svd import truncated_svd
from graphwright.passes.base import Context


class LoraSbOptions(RankOptions):
    """Options of adapt.lora_sb."""

    step: Annotated[float, Field(gt=0)] = 1e-4
    """Size of the first step of full tuning: its learning rate, divided by the steps of its
    warm-up."""

    iterations: Annotated[int, Field(ge=0)] | None = 10
    """Rounds of the fast decomposition by random projections; the exact one when absent."""

    gradient: TuneOptions = TuneOptions(steps=17)
    """Batches (`steps`) and loss of the gradient that the step is taken along."""


class LoraSb(RankPass[LoraSbOptions]):
    """Trains a core R of rank by rank numbers between directions of the first full step.

    The gradient of every weight is summed over a few batches; D = -step * sign(gradient) is what
    full tuning with Adam would do first. With D ~ U S V^T, the branch is U_r R V_r^T x with R
    starting at S_r: the factors are orthonormal and fixed, and a gradient step on R is the best
    that a full step can be projected to. The function is changed at once, by that first step.

    Source: Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for
    Extremely Efficient Low-Rank Fine-Tuning", sections 3.2 to 3.4.
    """

    papers = ("P88",)
    contract = "lossy"
    needs = "training"
    weights = "trained"

    def prepare(
        self, program: Program, chosen: Sequence[Layer], context: Context
    ) -> dict[str, Tensor]:
        """The sums of the gradients, by name of the weight."""
        names = {layer.weight for layer in chosen}
        state: dict[str, Any] = dict(program.state)
        for name in names:
            state[name] = nn.Parameter(program.state[name].detach())
        sums = Sums()
        still = self.options.gradient.model_copy(update={"keep_best": False, "hold_out": 0.0})
        tune(program.replace(state=state), context.training_data, still, context.within("step"),
             hooks=(sums,), names=names, optimizer=_standing)  # fmt: skip
        return sums.total

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        rank = rank_of(self.options, layer)
        weight_matrix(branch, layer)  # refuses what has none
        gradient = branch.found[layer.weight].double()
        gradient = gradient.t() if layer.kind in TURNED else gradient.flatten(1)
        if not bool(gradient.any()):
            raise ModelError(f"no gradient reaches the weight of {layer.name!r}",
                             fix="Leave it out of targets.")  # fmt: skip
        step = -self.options.step * gradient.sign()
        u, s, vh = truncated_svd(step, rank, self.options.iterations, generator)
        add_core(branch, layer, vh, torch.diag(s), u, 1.0)
        share = float(s.square().sum() / step.square().sum())
        return f"rank {rank}, {share:.0%} of the first step's squares"

    def refusal(self, layer: Layer) -> str:
        super().refusal(layer)
        if not layer.weight:
            return "its weight is rebuilt from codes, which have no gradient"
        return "a grouped convolution's weight is no one matrix" if groups_of(layer) > 1 else ""

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        return with_core(layer)


class Sums(Hook):
    """Adds up the gradients of all steps."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def before_step(self, at: Moment) -> None:
        for name, parameter in at.parameters.items():
            if parameter.grad is not None:
                grad = parameter.grad.detach().cpu().float()
                self.total[name] = self.total[name] + grad if name in self.total else grad.clone()

    def state_dict(self) -> dict[str, Any]:
        return {"total": dict(self.total)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = dict(state["total"])


def _standing(
    parameters: Mapping[str, nn.Parameter], options: TuneOptions
) -> torch.optim.Optimizer:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(list(parameters.values()), lr=0.0)
