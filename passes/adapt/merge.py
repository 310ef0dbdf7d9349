"""adapt.merge: adapters worked into the weights of their layers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from graphwright.ir.adapters.merging import Formula, merge
from graphwright.ir.adapters.record import Adapter, adapters
from graphwright.ir.errors import ArgumentError, ContractError, ModelError
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import AdapterPass
from graphwright.passes.base import Action, Context, Pass, Result, find_pass


class MergeOptions(Options):
    """Options of adapt.merge."""

    names: tuple[str, ...] = ("*",)
    """Adapters to merge: globs over their names."""

    max_lost: Annotated[float, Field(gt=0)] = 0.01
    """Largest share of a layer's change that may get lost when the sum is rounded to the weight's
    dtype. In bfloat16 small changes vanish: they are merged in float32 (`cast.dtype`) or not at
    all."""


class Merge(Pass[MergeOptions]):
    """Adds adapters to the weights that they change, and takes their nodes out.

    What is left is the graph of the original, as fast and as large. Sums are formed in float32 or
    more and rounded once. Adapters that are no linear change of a weight are refused by name, and
    so are weights that an earlier pass holds in codes: quantize after merging.

    Source: Hu et al. 2021, "LoRA", section 4.1; the other kinds as their own pages say.
    """

    contract = "exact"
    weights = "reformed"
    tolerance = 1e-5
    before = ("quantize.*",)

    def run(self, program: Program, context: Context) -> Result:
        known = adapters(program)
        chosen = [a for name, a in known.items()
                  if any(fnmatchcase(name, p) for p in self.options.names)]  # fmt: skip
        if not chosen:
            there = ", ".join(map(repr, known)) or "none"
            raise ArgumentError(f"{self.id}: names {list(self.options.names)} match no adapter",
                                fix=f"The program has {there}.")  # fmt: skip
        merged, applied = merge(program, chosen, _formula, self.id)
        for row in applied:
            if row.lost > self.options.max_lost:
                raise ContractError(
                    f"{self.id}: rounding to the weight's dtype loses {row.lost:.0%} of what the "
                    f"adapter changes in {row.layer!r}",
                    fix="Put cast.dtype: float32 before it, or raise max_lost.",
                )
        actions = [Action(row.layer, f"weight changed by {row.change:.2e} of its norm",
                          f"{row.lost:.1e} of the change lost to rounding" if row.lost else "")
                   for row in applied]  # fmt: skip
        return Result(merged, tuple(actions), {"merged_layers": float(len(applied))})


def _formula(adapter: Adapter) -> Formula:
    kind = find_pass(adapter.kind)
    if not issubclass(kind, AdapterPass):
        raise ModelError(
            f"adapter {adapter.name!r} is a network of its own ({adapter.kind}), and no change of "
            "a weight that could be merged",
            fix="Leave it beside the model; it is exported as it is.",
        )
    return kind.merged
