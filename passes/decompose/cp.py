"""decompose.cp: a convolution as one along every axis of its kernel, channel by channel."""

from __future__ import annotations

from math import prod
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from graphwright.ir.calibration.site import Solved
from graphwright.ir.edit import Editor
from graphwright.ir.layers.factors import relative_error
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result, WeightKind
from graphwright.passes.decompose._form.eligible import eligible
from graphwright.passes.decompose._form.ranks import Count, DecomposeOptions, names, own_ranks
from graphwright.passes.decompose._form.report import MASKS, metrics
from graphwright.passes.decompose._form.stages import Stage, insert_stages
from graphwright.passes.decompose._math.tensors import cp, cp_whole


class CpOptions(DecomposeOptions):
    """Options of decompose.cp."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("ratio", "'ratio' not in given or rank is None",
             "ratio has no part where a rank is given"),
    )  # fmt: skip

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the parameters of every layer that goes, where no rank is given."""

    rank: Count | None = None
    """Channels between the new layers."""

    ranks: dict[str, Count] = Field(default_factory=dict)
    """Ranks of single layers instead, by selector pattern; of several that fit, the last."""


class Cp(Pass[CpOptions]):
    """Puts a 1x1 convolution to `rank` channels, one along every axis of the kernel for each of
    these, and a 1x1 back, in the place of a convolution.

    The kernel becomes a sum of `rank` products of vectors (CP, or PARAFAC), found by alternating
    least squares from the leading singular vectors on. Looks at no data. The sum can be hard to
    find, and to tune: compare with `decompose.tucker`. A kernel of one place is a matrix, which
    `decompose.svd` takes; a layer that would not get smaller stays.

    Source: Lebedev et al. 2014, "Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition", section 3. The paper finds the sum by nonlinear least squares.
    """

    contract = "lossy"
    takes: ClassVar[tuple[WeightKind, ...]] = ("conv",)
    before = ("quantize.*", *MASKS)
    weights = "reformed"
    stores_weights = True

    def run(self, program: Program, context: Context) -> Result:
        groups, actions = eligible(program, self.id, self.options.targets, CONVOLUTIONS)
        own = own_ranks(program, self.options.ranks, CONVOLUTIONS)
        editor = Editor(program, by=self.id)
        results = []
        for uses in groups:
            solved, action = self._decompose(editor, uses, own.get(uses[0].name), context)
            results.append(solved)
            actions.append(action)
        return Result(editor.finish(), tuple(actions), metrics(program, groups, results))

    def _decompose(
        self, editor: Editor, uses: list[Layer], own: int | None, context: Context
    ) -> tuple[Solved, Action]:
        w = editor.state[uses[0].weight].detach()
        name = names(uses)
        if prod(w.shape[2:]) == 1:
            return Solved(), Action.left(name, "its kernel is a matrix: decompose.svd takes it")
        axes = [axis for axis, size in enumerate(w.shape[2:]) if size > 1]
        each = w.shape[0] + w.shape[1] + sum(w.shape[2 + axis] for axis in axes)
        by_ratio = max(1, int((1 - self.options.ratio) * w.numel() / each + 1e-9))
        rank = own or self.options.rank or by_ratio
        if rank * each >= w.numel():
            reason = (
                f"rank {rank} would store {rank * each:,} numbers in the place of {w.numel():,}"
            )
            return Solved(), Action.left(name, reason)
        folded = w.reshape(*w.shape[:2], *(w.shape[2 + axis] for axis in axes))
        factors = cp(folded, rank, context.generator("cp", uses[0].name))
        error = relative_error(folded.double() - cp_whole(factors), folded, None)
        insert_stages(editor, uses, stages(factors, axes, w.dim() - 2))
        told = f"rank {rank}, {rank * each / w.numel():.0%} of its parameters, "
        info = {"kept": float(rank * each), "error": error}
        return Solved(state={"last": factors[0]}, info=info), Action(
            name, f"{told}relative error {error:.2e}"
        )


def stages(factors: list[Tensor], axes: list[int], rank_of_kernel: int) -> list[Stage]:
    """The convolutions of factors out, in, and one per axis.

    Args:
        factors: (size, rank) each.
        axes: of the kernel that have more than one place.
        rank_of_kernel: how many axes there are.
    """
    out, inner, *along = factors
    rank = out.shape[1]
    flat = [1] * rank_of_kernel
    made = [Stage("first", inner.t().reshape(rank, -1, *flat))]
    rest = [axis for axis in range(rank_of_kernel) if axis not in axes]
    for place, (axis, factor) in enumerate(zip(axes, along, strict=True)):
        shape = [1] * rank_of_kernel
        shape[axis] = -1
        moved = (axis, *rest) if place == 0 else (axis,)  # strides of axes without a kernel
        made.append(Stage(f"axis{axis}", factor.t().reshape(rank, 1, *shape), moved, rank))
    return [*made, Stage("last", out.reshape(-1, rank, *flat))]
