"""decompose.tucker: a convolution as a small one between two that mix channels."""

from __future__ import annotations

from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from graphwright.ir.calibration.site import Solved
from graphwright.ir.edit import Editor
from graphwright.ir.layers.factors import relative_error
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Action, Context, Pass, Result, WeightKind
from graphwright.passes.decompose._form.eligible import eligible
from graphwright.passes.decompose._form.ranks import RankOptions, choose_rank, names, own_ranks
from graphwright.passes.decompose._form.report import MASKS, metrics
from graphwright.passes.decompose._form.stages import Stage, insert_stages
from graphwright.passes.decompose._math.tensors import tucker, unfold


class TuckerOptions(RankOptions):
    """Options of decompose.tucker. A rank is that of the output channels; input channels get the
    same share of theirs. `energy` is asked of both."""


class Tucker(Pass[TuckerOptions]):
    """Puts three convolutions in the place of one: 1x1 to few channels, the kernel on these, 1x1.

    The kernel is decomposed along its two modes of channels (Tucker-2), from the leading singular
    vectors of both on, by alternating. Looks at no data. A kernel of one place is a matrix, which
    `decompose.svd` takes; a layer that would not get smaller stays.

    Source: Kim et al. 2015, "Compression of Deep Convolutional Neural Networks for Fast and Low
    Power Mobile Applications", section 3.1. Ranks there come from variational Bayes; here they are
    given, or follow from a share.
    """

    contract = "lossy"
    takes: ClassVar[tuple[WeightKind, ...]] = ("conv",)
    before = ("quantize.*", *MASKS)
    weights = "reformed"
    stores_weights = True

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.decompositions(layers)

    def run(self, program: Program, context: Context) -> Result:
        groups, actions = eligible(program, self.id, self.options.targets, CONVOLUTIONS)
        own = own_ranks(program, self.options.ranks, CONVOLUTIONS)
        editor = Editor(program, by=self.id)
        results = []
        for uses in groups:
            solved, action = self._decompose(editor, uses, own.get(uses[0].name))
            results.append(solved)
            actions.append(action)
        return Result(editor.finish(), tuple(actions), metrics(program, groups, results))

    def _decompose(
        self, editor: Editor, uses: list[Layer], own: int | None
    ) -> tuple[Solved, Action]:
        w = editor.state[uses[0].weight].detach()
        area, name = prod(w.shape[2:]), names(uses)
        if area == 1:
            return Solved(), Action.left(name, "its kernel is a matrix: decompose.svd takes it")
        p, q = self._ranks(w, own)
        kept = cost(tuple(w.shape), p, q)
        if kept >= w.numel():
            reason = f"ranks {p} and {q} would store {kept:,} numbers in the place of {w.numel():,}"
            return Solved(), Action.left(name, reason)
        found = tucker(w, p, q)
        error = relative_error(w.double() - found.whole(), w, None)
        flat = [1] * (w.dim() - 2)
        stages = [
            Stage("first", found.inner.t().reshape(q, -1, *flat)),
            Stage("core", found.core, tuple(range(w.dim() - 2))),
            Stage("last", found.out.reshape(-1, p, *flat)),
        ]
        insert_stages(editor, uses, stages)
        told = f"{q} of {w.shape[1]} channels in, {p} of {w.shape[0]} out, "
        told += f"{kept / w.numel():.0%} of its parameters, relative error {error:.2e}"
        solved = Solved(state={"core": found.core}, info={"kept": float(kept), "error": error})
        return solved, Action(name, told)

    def _ranks(self, w: Tensor, own: int | None) -> tuple[int, int]:
        """Channels out and in of the core."""
        options = self.options
        out, inner, whole = w.shape[0], w.shape[1], w.numel()
        rank = own or options.rank
        if rank is not None:
            share = min(1.0, rank / out)
            return min(rank, out), max(1, round(share * inner))
        if options.energy is not None:
            p, q = (choose_rank(options, torch.linalg.svdvals(unfold(w.double(), mode)), whole, 1)
                    for mode in (0, 1))  # fmt: skip
            return p, q
        # (out^2 + in^2) share + whole share^2 = (1 - ratio) whole
        linear = out**2 + inner**2
        share = (sqrt(linear**2 + 4 * whole * (1 - options.ratio) * whole) - linear) / (2 * whole)
        return max(1, int(share * out + 1e-9)), max(1, int(share * inner + 1e-9))


def cost(shape: tuple[int, ...], rank_out: int, rank_in: int) -> int:
    """Parameters of the three kernels in the place of one (out, in, *k)."""
    out, inner, *kernel = shape
    return inner * rank_in + rank_in * rank_out * prod(kernel) + out * rank_out
