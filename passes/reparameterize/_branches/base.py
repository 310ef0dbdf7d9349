"""The base of the passes that fold branches: each says which branches it looks for."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from graphwright.ir.edit import Editor
from graphwright.ir.folding import Region, fold
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class BranchOptions(Options):
    """Options of the passes that fold branches."""

    max_macs: Annotated[float, Field(gt=0)] = 1.0
    """Multiplications that the one layer may take, as a share of what its branches take
    together."""


class BranchPass(Pass[BranchOptions]):
    """Folds branches that are summed into one convolution.

    Class attributes:
        kinds: branches that a stretch may have.
        asks: kinds of which it has at least one.
        what: the branches in words, for the report.
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    before = ("quantize.*", "prune.*")
    kinds: ClassVar[frozenset[str]] = frozenset()
    asks: ClassVar[frozenset[str]] = frozenset()
    what: ClassVar[str] = ""

    def is_wanted(self, region: Region) -> bool:
        """Whether the pass looks for such a stretch."""
        found = {branch.kind for branch in region.branches}
        return (
            len(region.branches) > 1
            and found <= self.kinds
            and (not self.asks or bool(found & self.asks))
            and bool(region.layers)
        )

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        done, left = fold(editor, self.is_wanted, self.options.max_macs)
        if not done and not left:
            left = [Action.left("graph", f"no sum of {self.what} of one input")]
        return Result(editor.finish(), (*done, *left))
