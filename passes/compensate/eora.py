"""compensate.eora: a low-rank correction that is best for what the layers really compute."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field
from torch import Tensor

from graphwright.ir.calibration.hessian import hessian, seen_or_even
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.layers.factors import Factors, eigenspace, relative_error, split
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.products import as_matrix, from_matrix
from graphwright.ir.layers.selectors import select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.compensate._math import low_rank


class EoraOptions(Bounded):
    """Options of compensate.eora."""

    rank: Annotated[int, Field(ge=1)] = 128
    """Rank of every correction; a layer with fewer rows or columns gets as many as it has."""

    targets: Selector = ("*",)
    """Layers to compensate: selector patterns over names and kinds. Those that no earlier pass has
    changed are left alone."""


class Eora(Pass[EoraOptions]):
    """Gives every compressed layer a low-rank correction, found in the eigenspace of its inputs.

    With H = X^T X = Q L Q^T of the calibration inputs and dW = W - Wc, the truncated SVD of
    dW Q L^(1/2) gives the b a of rank r with the least ||X (dW - b a)^T||: the error of what the
    layer computes, where a plain SVD (`compensate.svd`) minimizes the error of its weight. Nothing
    is trained. Any compression will do: quantized, pruned, both; W is taken from the model before
    the first pass. The layers are gone through in order, and each sees the inputs that the
    compensated layers before it give.

    Eigenvalues below float32's resolution of the largest are raised to it; the paper's code sets
    negative ones to the smallest positive one, which can be so small that factors grow without
    bound. That code also keeps the original weights inside the block it is at; here every layer is
    compensated before the next one's inputs are computed.

    Source: Liu et al. 2024, "EoRA: Training-free Compensation for Compressed LLM with Eigenspace
    Low-Rank Approximation", section 3.
    """

    contract = "lossy"
    behind = low_rank.COMPRESSING
    needs = "calibration"
    papers = ("P02",)
    after = ("cleanup.*", "cast.*", "prune.*", "quantize.*")

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.hessians(layers) + load.decompositions(layers)

    def run(self, program: Program, context: Context) -> Result:
        chosen = select(program, self.options.targets, PRODUCTS)
        originals, actions = low_rank.differences(program, context.before_compression, chosen)
        changed = low_rank.changed(chosen, originals)
        method = _Method(self.options.rank, originals)
        solved = sweep(program, changed, context.batches, method, context)
        found: dict[str, Factors] = {}
        before, after = [], []
        for layer in changed:
            state, info = solved[layer.node.name].state, solved[layer.node.name].info
            found[layer.name] = Factors(state["b"], state["a"])
            before.append(info["before"])
            after.append(info["after"])
            actions.append(low_rank.action(layer.name, state["b"].shape[-1], before[-1], after[-1]))
        result = low_rank.insert(program, self.id, changed, found)
        return Result(result, tuple(actions), low_rank.metrics(before, after))


class _Stats(NamedTuple):
    """The statistics that the layers of one activation share, and the first weight of each."""

    h: Tensor
    basis: Tensor
    inverse: Tensor
    originals: dict[str, Tensor]


class _Method:
    def __init__(self, rank: int, originals: dict[str, Tensor]) -> None:
        self.rank, self._originals = rank, originals

    def __getstate__(self) -> dict[str, int]:
        """For a worker elsewhere, which needs the rank only: originals travel with their layer."""
        return {"rank": self.rank}

    def gather(self, site: Site) -> _Stats:
        h = seen_or_even(hessian(site.rows()))[0]
        basis, inverse = eigenspace(h)
        return _Stats(h, basis, inverse, {x.name: self._originals[x.name] for x in site.layers})

    def solve(self, task: Task) -> Solved:
        stats: _Stats = task.stats
        original = stats.originals[task.name].float()
        compressed = as_matrix(task.geometry, task.weight)[0].float()
        delta = original - compressed
        factors = split(delta, stats.basis, stats.inverse, self.rank)
        left = delta - factors.b @ factors.a
        value = from_matrix(task.geometry, (compressed + factors.b @ factors.a)[None])
        return Solved(
            value.to(task.weight.dtype),
            state={"b": factors.b, "a": factors.a},
            info={
                "before": relative_error(delta, original, stats.h),
                "after": relative_error(left, original, stats.h),
            },
        )
