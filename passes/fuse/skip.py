"""fuse.skip: a skip beside linear layers becomes a part of their weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graphwright.ir.edit import Editor
from graphwright.ir.folding import Region, fold
from graphwright.ir.graph.skips import Skip as Found
from graphwright.ir.graph.skips import find_skips
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class SkipOptions(Options):
    """Options of fuse.skip."""

    max_macs: Annotated[float, Field(gt=0)] = 1.0
    """Multiplications that the one layer may take, as a share of what body and skip take
    together."""


class Skip(Pass[SkipOptions]):
    """Folds identity and 1x1 skips into the convolution or linear layer that they go past.

    x + conv(x) is one convolution with a Dirac kernel added, x + linear(x) one linear layer with
    the identity added, conv(x) + conv1x1(x) one convolution; batch norms and constant factors may
    stand on either way. That is exact where the body has no nonlinear function.

    All other skips stay, with the reason; a sum in front of a layer norm becomes a part of that
    norm when the program is lowered, and one behind a convolution is left to the runtime.

    Source: Ding et al. 2021, "RepVGG", for the identity as a kernel.
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    before = ("quantize.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        done, left = fold(editor, _has_skip, self.options.max_macs)
        result = editor.finish()
        names = {layer.node: layer.name for layer in layers(result)}
        tried = {action.layer for action in left}
        stay = [
            Action.left(f"skip past {names[skip.body[-1]]}", _reason(skip), "kept")
            for skip in find_skips(result)
            if names[skip.body[-1]].rpartition(".")[0] not in tried
        ]
        if not done and not left and not stay:
            stay = [Action.left("graph", "no skip")]
        return Result(result, (*done, *left, *stay), {"skips_left": float(len(stay))})


def _has_skip(region: Region) -> bool:
    kinds = [branch.kind for branch in region.branches]
    past = [kind for kind in kinds if kind not in ("identity", "average")]
    return len(kinds) > 1 and bool(past) and ("identity" in kinds or "pointwise" in kinds)


def _reason(skip: Found) -> str:
    if skip.kind == "cat":
        return "it is joined to the body's result, not added"
    return "what it goes past is not linear"
