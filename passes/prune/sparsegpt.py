"""prune.sparsegpt: weights become zero, and those that stay make up for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.calibration.hessian import Hessian, hessian, inverse_factor, seen_or_even
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.layers.products import as_matrix, from_matrix
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import MATRICES, Action, Context, Pass, Result
from graphwright.passes.prune._masks.distribution import LayerwiseOptions, distributed
from graphwright.passes.prune._masks.layers import maskable, share_of_zeros, with_weights
from graphwright.passes.prune._masks.patterns import Pattern
from graphwright.passes.prune._math import sparsegpt


class SparsegptOptions(LayerwiseOptions):
    """Options of prune.sparsegpt."""

    block: Annotated[int, Field(ge=1)] = sparsegpt.BLOCK
    """Columns whose part of an unstructured mask is chosen together."""

    damping: Annotated[float, Field(ge=0)] = 0.01
    """Added to the diagonal of the Hessian, as a share of its mean; raised tenfold, up to three
    times, where the matrix is singular even so."""


@dataclass(frozen=True)
class SparsegptMethod:
    """Masks and updates by the second moments of the input."""

    patterns: Mapping[str, Pattern]
    block: int
    damping: float

    def gather(self, site: Site) -> Hessian:
        """The Hessian of the layers' squared output error."""
        return hessian(site.rows())

    def solve(self, task: Task) -> Solved:
        """The pruned and updated weight."""
        w = as_matrix(task.geometry, task.weight).float()
        parts, used = [], 0.0
        for group, h in zip(w, seen_or_even(task.stats), strict=True):
            upper, damping = inverse_factor(h, self.damping, task.name)
            new, _ = sparsegpt.prune_matrix(
                group, upper, self.patterns[task.name], dead=h.diagonal() == 0, block=self.block
            )
            parts.append(new)
            used = max(used, damping)
        new = torch.stack(parts)
        weight = from_matrix(task.geometry, new).to(task.weight.dtype)
        info = {
            "error": relative_error(w, new, task.stats.matrix),
            "zeros": float((weight == 0).float().mean()),
            "damping": used,
        }
        return Solved(weight, state={"weight": weight}, info=info)


def relative_error(w: Tensor, new: Tensor, h: Tensor) -> float:
    """||x (w - new)^T|| / ||x w^T|| over the calibration data; 0 where the output is 0.

    Args:
        w, new: (groups, rows, columns).
        h: (groups, columns, columns), mean of x x^T.
    """

    def size(matrix: Tensor) -> float:
        return max(0.0, float(((matrix @ h) * matrix).sum()))

    whole = size(w)
    return (size(w - new) / whole) ** 0.5 if whole > 0 else 0.0


class Sparsegpt(Pass[SparsegptOptions]):
    """Prunes layer by layer, and moves the weights that stay so that outputs change least.

    With the Hessian H of a layer's squared output error, pruning weight j of a row costs
    w_j^2 / [H^-1]_jj, and the columns behind j are updated to make up for it; both come from one
    Cholesky factor of the inverse of H + damping. Masks are chosen in blocks of columns, from the
    weights as the pruned columns before them have left them. Layers are pruned in the order of
    the graph, each on the activations that the pruned layers before it give.

    Peak memory: one Hessian and its factor (inputs x inputs, float32) beside the program.

    Source: Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned
    in one-shot", algorithm 1. Weights of inputs that were always zero count as free; the paper's
    code sets them all to zero.
    """

    contract = "lossy"
    takes = MATRICES
    needs = "calibration"

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.hessians(layers) + load.columns(layers)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        pattern = o.wanted()
        layers, actions = maskable(program, o.targets, pattern)
        patterns = distributed(program, layers, o, context)
        method = SparsegptMethod(patterns, o.block, o.damping)
        found = sweep(program, layers, context.batches, method, context)
        weights = {layer.weight: found[layer.node.name].state["weight"] for layer in layers}
        for layer in layers:
            info = found[layer.node.name].info
            what = f"{info['zeros']:.1%} zeros, output error {info['error']:.3f}"
            raised = info["damping"] > o.damping
            why = f"damping raised to {info['damping']:g}" if raised else ""
            actions.append(Action(layer.name, what, why))
        errors = [found[layer.node.name].info["error"] for layer in layers]
        pruned = with_weights(program, self.id, weights)
        metrics = {
            "layers": float(len(weights)),
            "sparsity": share_of_zeros(pruned, list(weights)),
            "layer_error_mean": sum(errors) / len(errors),
            "layer_error_max": max(errors),
        }
        return Result(pruned, tuple(actions), metrics)
