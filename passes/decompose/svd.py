"""decompose.svd: a layer as two narrow ones, by the singular values of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphwright.ir.calibration.hessian import hessian, seen_or_even
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.layers.factors import Factors, eigenspace, factors_of, relative_error
from graphwright.ir.layers.kinds import CONVOLUTIONS, MATRICES
from graphwright.ir.layers.products import as_matrix, from_matrix, geometry, weight_value
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Action, Context, Need, Pass, Result, WeightKind
from graphwright.passes.decompose._form.eligible import eligible
from graphwright.passes.decompose._form.pair import (
    Form,
    as_pair_matrix,
    cost_per_rank,
    insert_pair,
)
from graphwright.passes.decompose._form.ranks import RankOptions, choose_rank, names, own_ranks
from graphwright.passes.decompose._form.report import MASKS, metrics

KINDS = (*MATRICES, *CONVOLUTIONS)


class SvdOptions(RankOptions):
    """Options of decompose.svd."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("convolutions", "convolutions != 'spatial' or weighting == 'none'",
             "spatial pairs have no closed form under weighting {weighting}: take channel"),
    )  # fmt: skip

    weighting: Literal["activations", "none"] = "activations"
    """What the error is measured on: the outputs of the layer on calibration data, or its weight
    alone, which needs no data."""

    convolutions: Literal["channel", "spatial"] = "channel"
    """The two kernels of a convolution: its whole kernel with few outputs and then 1x1, or the
    kernel's first axis and then the others. A kernel of one axis, or of one place, has the
    first form alone."""


class Svd(Pass[SvdOptions]):
    """Puts two layers with few channels between them in the place of a layer: W ~ U V.

    Weighted by activations, with H the second moments of the inputs, U V is the truncated SVD of
    W H^(1/2), brought back: no matrix of that rank leaves a smaller error of the outputs. Layers
    are gone through in order, each on the inputs that the decomposed ones before it give. Without
    weighting it is the truncated SVD of W (Eckart and Young 1936). A convolution is the matrix of
    its windows, or a pair of kernels along its axes. A layer that the rank would not make smaller
    stays.

    Source: Jaderberg et al. 2014, "Speeding up convolutional neural networks with low rank
    expansions", scheme 2 (spatial pairs); Wang et al. 2024, "SVD-LLM", section 3.1 (whitening, here
    by the symmetric root instead of the Cholesky factor: the result is the same).
    """

    contract = "lossy"
    takes: ClassVar[tuple[WeightKind, ...]] = ("linear", "conv")
    needs = "calibration"
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {("weighting", "none"): "nothing"}
    before = ("quantize.*", *MASKS)
    weights = "reformed"
    stores_weights = True

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        work = super().cost(load) + load.decompositions(layers)
        return work if self.needed == "nothing" else work + load.hessians(layers)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        groups, actions = eligible(program, self.id, options.targets, KINDS)
        own = own_ranks(program, options.ranks, KINDS)
        method = Truncation(options, own)
        if options.weighting == "activations":
            every = [layer for uses in groups for layer in uses]
            found = sweep(program, every, context.batches, method, context)
            results = [found[uses[0].node.name] for uses in groups]
        else:
            results = [method.solve(_task(program, uses[0])) for uses in groups]
        editor = Editor(program, by=self.id)
        for uses, solved in zip(groups, results, strict=True):
            actions.append(_place(editor, uses, solved, options))
        return Result(editor.finish(), tuple(actions), metrics(program, groups, results))


@dataclass(frozen=True)
class Truncation:
    """The factors of one layer after the other, see `ir.calibration.walk`."""

    options: SvdOptions
    own: Mapping[str, int]

    def gather(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments of the inputs, their root and its inverse."""
        h = seen_or_even(hessian(site.rows()))[0]
        return h, *eigenspace(h)

    def solve(self, task: Task) -> Solved:
        """Both kernels, or none where they would be as large as the weight."""
        h, basis, inverse = task.stats or (None, None, None)
        form = form_of(task.geometry.shape, self.options)
        matrix = as_matrix(task.geometry, task.weight)[0].double()
        if form == "spatial":
            matrix = as_pair_matrix(task.weight.double(), form)
        wide = matrix if basis is None else matrix @ basis
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        per_rank = cost_per_rank(task.weight.shape, form)
        rank = self.own.get(task.name, 0) or choose_rank(
            self.options, s, task.weight.numel(), per_rank
        )
        rank = min(rank, len(s))
        info = {"rank": float(rank), "most": float(len(s)), "kept": float(rank * per_rank)}
        if rank * per_rank >= task.weight.numel():
            return Solved(info=info)
        factors = factors_of(u, s, vh, inverse, rank)
        value = factors.b.double() @ factors.a.double()
        info["error"] = relative_error(matrix - value, matrix, h)
        state = {"b": factors.b, "a": factors.a}
        if h is None:
            return Solved(state=state, info=info)
        return Solved(from_matrix(task.geometry, value[None]).to(task.weight.dtype), None, None,
                      state, info)  # fmt: skip


def form_of(shape: tuple[int, ...], options: SvdOptions) -> Form:
    """Spatial pairs where they are asked for and the kernel has two axes to part."""
    if options.convolutions == "spatial" and len(shape) > 3 and max(shape[2:]) > 1:
        return "spatial"
    return "channel"


def _task(program: Program, layer: Layer) -> Task:
    return Task(layer.name, geometry(program, layer), weight_value(program, layer), None, None, 0)


def _place(editor: Editor, uses: list[Layer], solved: Solved, options: SvdOptions) -> Action:
    rank, most, kept = (int(solved.info[key]) for key in ("rank", "most", "kept"))
    weight = editor.state[uses[0].weight]
    if not solved.state:
        return Action.left(
            names(uses),
            f"rank {rank} would store {kept:,} numbers in the place of {weight.numel():,}",
        )

    factors = Factors(solved.state["b"], solved.state["a"])
    form = form_of(tuple(weight.shape), options)
    insert_pair(editor, uses, factors, form)
    return Action(
        names(uses),
        f"rank {rank} of {most}, {kept / weight.numel():.0%} of its parameters, "
        f"relative error {solved.info['error']:.2e}",
    )
