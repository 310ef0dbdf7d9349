"""prune.wanda: the weights that change a layer's output least become zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.layers.products import as_matrix, from_matrix
from graphwright.ir.program import Program
from graphwright.passes.base import MATRICES, Action, Context, Pass, Result
from graphwright.passes.prune._masks.distribution import LayerwiseOptions, distributed
from graphwright.passes.prune._masks.layers import maskable, share_of_zeros, with_weights
from graphwright.passes.prune._masks.patterns import Pattern
from graphwright.passes.prune._math.features import Features, features


class WandaOptions(LayerwiseOptions):
    """Options of prune.wanda."""


@dataclass(frozen=True)
class WandaMethod:
    """Masks by |w| ||x|| in every row."""

    patterns: Mapping[str, Pattern]

    def gather(self, site: Site) -> Features:
        """Sizes of the input's features."""
        return features(site)

    def solve(self, task: Task) -> Solved:
        """The masked weight."""
        w = as_matrix(task.geometry, task.weight)
        score = w.float().abs() * task.stats.norm.unsqueeze(1)
        pattern = self.patterns[task.name]
        keep = torch.stack([pattern.keep(group) for group in score])
        weight = from_matrix(task.geometry, w.where(keep, 0.0))
        return Solved(weight, state={"weight": weight}, info={"zeros": _zeros(weight)})


def _zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


class Wanda(Pass[WandaOptions]):
    """Sets weights to zero where |w_ij| ||x_j|| is lowest in a row; the others stay as they are.

    x_j is an input feature over the calibration data. Rows are compared within themselves only,
    so every output keeps the same number of inputs. Layers are pruned in the order of the graph,
    each on the activations that the pruned layers before it give.

    Source: Sun et al. 2024, "A simple and effective pruning approach for large language models",
    equation 1 and section 3. The paper measures a whole transformer block before it prunes it;
    here every layer waits for the ones before it.
    """

    contract = "lossy"
    takes = MATRICES
    needs = "calibration"

    def run(self, program: Program, context: Context) -> Result:
        pattern = self.options.wanted()
        layers, actions = maskable(program, self.options.targets, pattern)
        method = WandaMethod(distributed(program, layers, self.options, context))
        found = sweep(program, layers, context.batches, method, context)
        weights = {layer.weight: found[layer.node.name].state["weight"] for layer in layers}
        actions += [
            Action(layer.name, f"{found[layer.node.name].info['zeros']:.1%} zeros")
            for layer in layers
        ]
        pruned = with_weights(program, self.id, weights)
        metrics = {"layers": float(len(weights)), "sparsity": share_of_zeros(pruned, list(weights))}
        return Result(pruned, tuple(actions), metrics)
