"""adapt.unmerge: the original weights back where adapters were merged."""

from __future__ import annotations

from graphwright.ir.adapters.merging import unmerge
from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class UnmergeOptions(Options):
    """Options of adapt.unmerge: it has none."""


class Unmerge(Pass[UnmergeOptions]):
    """Takes merged adapters out again: every weight gets the bytes that it had before.

    Nothing is subtracted, which would not give them back: they are those of the model before the
    first pass, or of the `teacher` in Python. Both must be the very tensors that were merged, and
    no later pass may have changed them.

    Source: Hu et al. 2021, "LoRA", section 4.1, switching tasks.
    """

    contract = "lossy"
    weights = "reformed"

    def run(self, program: Program, context: Context) -> Result:
        if context.teacher is None:
            raise ArgumentError(f"{self.id} needs the program before the merge",
                                fix="In Python, pass teacher=program.")  # fmt: skip
        result, names = unmerge(program, context.teacher, self.id)
        return Result(result, tuple(Action(name, "as before the merge") for name in names))
