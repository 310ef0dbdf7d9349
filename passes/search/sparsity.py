"""search.sparsity: shares of zeros of single layers, found by evolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from graphwright.ir.context import Context
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import MATRICES, Action, Pass, Result
from graphwright.passes.inner import fits, inner_pass
from graphwright.passes.search._evolution.cost import evolution
from graphwright.passes.search._evolution.levels import switched
from graphwright.passes.search._evolution.run import EvolutionOptions, Search
from graphwright.passes.search._evolution.sparsity import Sparsity as Database


class SparsityOptions(EvolutionOptions):
    """Options of search.sparsity."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of zeros in all selected weights together."""

    pruner: str = "prune.sparsegpt"
    """Pass that prunes: any with the options `sparsity` and `targets` that makes single weights
    zero."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Its other options."""

    generations: Annotated[int, Field(ge=1)] = 400
    """Generations of the evolution."""

    steps: Annotated[int, Field(ge=1)] = 8
    """Levels of a layer on either side of the target."""

    step: Annotated[int, Field(ge=1)] | None = None
    """Weights that one level is worth (the paper: a million, in models of 7 billion); a sixteenth
    of the smallest layer's when absent."""

    @model_validator(mode="after")
    def _pruner_takes_its_options(self) -> Self:
        fits("pruner", lambda: self.pruner_of(self.target, ["*"]))
        return self

    def pruner_of(self, sparsity: float, targets: Sequence[str]) -> Pass:
        """The pass that prunes some layers to a sparsity.

        Raises:
            ArgumentError: there is none of that name, or it does not take the options.
        """
        given = {**self.options, "sparsity": sparsity, "targets": list(targets)}
        return inner_pass(self.pruner, ("sparsity", "pattern", "targets"), given,
                          "Use prune.sparsegpt, prune.wanda or prune.magnitude.")  # fmt: skip


class Sparsity(Pass[SparsityOptions]):
    """Prunes every layer to several sparsities, and finds which gets which by evolution.

    All layers begin at the target. Children of the best mixture so far have some layers with a
    step more zeros and as many others with a step fewer, a step being equally many weights in all
    layers, so that the share of zeros stays what it is; selection is as in `search.bits`.

    Peak memory: the selected weights once per level.

    Source: Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search" (P86), algorithms 1 and 2, with the released settings. Layers of one size are pruned to
    a level together, behind layers of other sizes as they were.
    """

    contract = "lossy"
    takes = MATRICES
    needs = "calibration"
    papers = ("P86",)

    def cost(self, load: Load) -> Work:
        options = self.options
        level = options.pruner_of(options.target, options.targets).cost(load)
        levels = level.times(2 * options.steps + 1)
        return super().cost(load) + levels + evolution(load, options, options.generations)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options

        def pruned(sparsity: float, layers: Sequence[str]) -> Program:
            if sparsity == 0:
                return program
            step = o.pruner_of(sparsity, layers)
            return step.run(program, context.within(f"{sparsity:.9f}", *layers)).program

        database = Database(program, pruned, o.target, o.steps, o.step, o.targets, self.id)
        database.build(context.progress)
        units = database.units
        search = Search(database, program, o, context, self.id)
        found = search.run(
            tuple(database.start), lambda levels, rng: switched(units, levels, rng), o.generations
        )
        shares = [database.sparsities[unit][level] for unit, level in enumerate(found.levels)]
        actions = [
            Action(name, f"{share:.1%} zeros")
            for unit, share in zip(units, shares, strict=True)
            for name in unit.layers
        ]
        kept, size = found.metrics["cost"], sum(database.sizes)
        metrics = {**found.metrics, "zeros": 1 - kept / size}
        return Result(found.program, (*actions, *found.notes), metrics)
