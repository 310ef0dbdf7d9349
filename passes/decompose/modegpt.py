"""decompose.modegpt: blocks of a transformer with fewer inner channels, in closed form."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from graphwright.ir.channels import cut
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import MATRICES, TURNED
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.ir.work import STRUCTURAL, Load, Work
from graphwright.passes.base import Action, Context, Pass, Result, WeightKind
from graphwright.passes.decompose._attention.find import Attention, attentions
from graphwright.passes.decompose._attention.rebuild import NewScores, NewValues, Rebuild
from graphwright.passes.decompose._attention.solve import (
    Moments,
    chosen_columns,
    factored_scores,
    factored_values,
)
from graphwright.passes.decompose._blocks.blocks import Block, find_blocks
from graphwright.passes.decompose._blocks.feed_forward import FeedForward
from graphwright.passes.decompose._blocks.influence import influences
from graphwright.passes.decompose._blocks.moments import SolvedUnits, gather
from graphwright.passes.decompose._form.ranks import DecomposeOptions
from graphwright.passes.decompose._form.report import MASKS
from graphwright.passes.decompose._form.stages import like
from graphwright.passes.decompose._math.modular import allocate


class ModegptOptions(DecomposeOptions):
    """Options of decompose.modegpt."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Mean share of the inner channels of a block that goes, and so of its parameters."""

    allocation: Literal["influence", "uniform"] = "influence"
    """The share of each block: by how much it changes what it is given, as in the paper, or the
    same for all."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    """For `influence`: evenness of the shares; the paper tunes it."""

    most: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """For `influence`: share that no block exceeds."""

    scores: Literal["columns", "svd"] = "columns"
    """How queries and keys get narrower: by picking channels (CR), as in the paper; or by SVD of
    their product, which is better where no rotation lies between them (and picks channels where one
    does)."""

    multiple_of: Annotated[int, Field(ge=1)] = 1
    """Widths are rounded to a multiple of this, within what there is; kernels like 8 or 16."""


class Modegpt(Pass[ModegptOptions]):
    """Shrinks the inner dimensions of transformer blocks, each pair of matrices in closed form.

    - Feed-forward: the hidden units of largest ridge leverage stay, and the down projection is
      solved anew by least squares (Nystrom).
    - Queries and keys: the channels of largest score stay (CR). Under a rotation channels go in
      pairs, and every head gets the rows of the tables that are its own. The scale of the scores
      stays that of the original width.
    - Values and output: the truncated SVD of their product, weighted by the inputs; heads that
      share values are approximated together, and the bias of the values moves into that of the
      output.

    Nothing is trained and nothing left over: the result is the same architecture with other widths.
    Shares of the blocks follow from how much each turns its input (block influence). All statistics
    are those of the unchanged model. Projections that are one layer (GPT-2) are parted. What is no
    such pair stays, with the reason: norms on queries and keys, caches, experts, shared weights.

    The paper's ridge of 1 is for sums over its own number of tokens; here it is 1% of the mean of
    the diagonal. The scores of rotated pairs are sums that no angle changes.

    Source: Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression",
    algorithms 1 to 3 and section 3.3.
    """

    contract = "lossy"
    papers = ("P09",)
    needs = "calibration"
    takes: ClassVar[tuple[WeightKind, ...]] = ("linear",)
    before = ("quantize.*", *MASKS)
    weights = "reformed"
    stores_weights = True

    def cost(self, load: Load) -> Work:
        return super().cost(load) + Work(edited=STRUCTURAL * load.nodes)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        blocks, actions = find_blocks(program, options.targets)
        if not blocks:
            raise ModelError(
                f"{self.id}: no block can be decomposed", details=tuple(_told(actions)[:6]),
                fix="It takes attention with projections of its own, and feed-forward parts.",
            )  # fmt: skip
        shares, warnings = self._shares(program, blocks, context)
        ranks = {
            part.down.name: self._width(len(part.units), share, 1)
            for block, share in zip(blocks, shares, strict=True)
            for part in block.feed_forwards
        }
        moments, solved = gather(program, blocks, ranks, context)
        found, rows = cut_units(program, blocks, solved, self.id)
        actions += rows
        editor = Editor(found, by=self.id)
        again = {a.out.name: a for _, a in attentions(found, layers(found, MATRICES))
                 if isinstance(a, Attention)}  # fmt: skip
        rebuild = Rebuild(editor)
        for block, share in zip(blocks, shares, strict=True):
            for attention in block.attentions:
                now = again[attention.out.name]
                actions += self._attention(found, now, block, share, moments, rebuild)
        result = editor.finish()
        metrics = {
            "blocks": float(len(blocks)),
            "parameters_kept": _parameters(result) / _parameters(program),
            "smallest_share": min(shares),
            "largest_share": max(shares),
        }
        return Result(result, tuple(actions), metrics, warnings=warnings)

    def _shares(
        self, program: Program, blocks: list[Block], context: Context
    ) -> tuple[list[float], tuple[str, ...]]:
        """The share of every block that goes."""
        options = self.options
        uniform = [options.ratio] * len(blocks)
        if options.allocation == "uniform" or options.ratio >= options.most:
            told = "" if options.allocation == "uniform" else "`ratio` leaves no room below `most`"
            return uniform, (f"{told}: all blocks lose the same share",) if told else ()
        joins = [block.joins(program) for block in blocks]
        known = [each for each in joins if each is not None]
        if len(known) < len(joins):
            lone = blocks[joins.index(None)].name
            return uniform, (
                f"{lone} is added to no residual stream, so its influence is unknown: "
                "all blocks lose the same share",
            )
        scores = influences(program, known, context.batches)
        return allocate(scores, options.ratio, options.temperature, options.most), ()

    def _width(self, whole: int, share: float, unit: int) -> int:
        """What is left of `whole`, in units, a multiple of `multiple_of` where that is less."""
        step = unit * self.options.multiple_of
        kept = round((1 - share) * whole / step) * step
        return min(whole, max(kept, step, unit))

    def _attention(
        self,
        program: Program,
        attention: Attention,
        block: Block,
        share: float,
        moments: dict[str, Moments],
        rebuild: Rebuild,
    ) -> list[Action]:
        """New projections of one attention, in the editor of `rebuild`."""
        query, key, value = attention.query, attention.key, attention.value
        names = f"{query.layer.name}, {key.layer.name}"
        outs = f"{value.layer.name}, {attention.out.name}"
        turn = query.rotation is not None
        does_scores, does_values = block.does(attention)
        told: list[Action] = []
        scores: NewScores | None = None
        values: NewValues | None = None
        width = self._width(query.width, share, 2 if turn else 1)
        inner = self._width(value.width, share, 1)
        shrinks = (does_scores and width < query.width, does_values and inner < value.width)
        if attention.is_fused:  # all that comes out of one layer is parted, or nothing
            shrinks = (any(shrinks), any(shrinks))
        if shrinks[0]:
            what = f"{width} of {query.width} channels per head"
            if self.options.scores == "svd" and not turn:
                scores = factored_scores(program, attention, moments, width)
                told.append(Action(names, f"{what}, by SVD"))
            else:
                scores, kept = chosen_columns(program, attention, moments, width)
                how = ", in pairs of the rotation" if turn else ""
                told.append(Action(names, f"{what}{how}, {kept:.0%} of the scores"))
        if shrinks[1]:
            values, error = factored_values(program, attention, moments, inner)
            told.append(Action(outs, f"{inner} of {value.width} channels per head, "
                               f"relative error {error:.2e}"))  # fmt: skip
        if told:
            rebuild(attention, scores, values)
        few = "its share of the channels is less than one per head"
        sides = ((does_scores, names), (does_values, outs))
        left = [
            name for (does, name), done in zip(sides, shrinks, strict=True) if does and not done
        ]
        return told + [Action.left(name, few) for name in left]


def cut_units(
    program: Program, blocks: list[Block], solved: dict[str, SolvedUnits], by: str
) -> tuple[Program, list[Action]]:
    """The program with the feed-forward parts solved, and the units that are gone cut out."""
    editor = Editor(program, by=by)
    picks, actions = {}, []
    for part in (part for block in blocks for part in block.feed_forwards):
        one = solved[part.down.name]
        kept = one.kept
        whole = len(part.units)
        names = ", ".join([*(up.name for up in part.ups), part.down.name])
        if len(kept) == whole:
            actions.append(Action.left(names, "its share is less than one unit"))
            continue
        editor.set_state(part.down.weight, _with_columns(program, part, one))
        gone = set(range(whole)) - set(kept.tolist())
        picks[part.group] = sorted(int(part.units[column]) for column in gone)
        actions.append(Action(names, f"{len(kept)} of {whole} hidden units, "
                              f"relative error {one.error:.2e}"))  # fmt: skip
    return cut(editor.finish(), picks), actions


def _with_columns(program: Program, part: FeedForward, one: SolvedUnits) -> Tensor:
    old = program.state[part.down.weight]
    new = old.detach().clone()
    if part.down.kind in TURNED:
        new[one.kept] = one.weight.t().to(new.dtype)
    else:
        new[:, one.kept] = one.weight.to(new.dtype)
    return like(old, new)


def _parameters(program: Program) -> int:
    return sum(p.numel() for p in program.parameters().values())


def _told(actions: list[Action]) -> list[str]:
    return [f"{action.layer}: {action.reason}" for action in actions]
