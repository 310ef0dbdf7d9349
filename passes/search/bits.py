"""search.bits: widths of single layers, found by evolution."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from graphwright.ir.context import Context
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import MATRICES, Action, Pass, Result
from graphwright.passes.inner import fits, inner_pass
from graphwright.passes.search._evolution.bits import Bits as Database
from graphwright.passes.search._evolution.cost import evolution
from graphwright.passes.search._evolution.levels import Levels, lowered, rebalanced, switched
from graphwright.passes.search._evolution.run import EvolutionOptions, Search


class BitsOptions(EvolutionOptions):
    """Options of search.bits."""

    rules = (
        Rule("bits", "all(a < b for a, b in zip(bits, bits[1:]))", "bits {bits} ascend, each once"),
        Rule("target", "bits[0] <= target <= bits[-1]",
             "target {target} lies outside the widths {bits}"),
        Rule("bits",
             "exchange == 'any' or all(b - a == bits[1] - bits[0] for a, b in zip(bits, bits[1:]))",
             "layers of one size exchange equal steps, and those of {bits} differ: set "
             "`exchange: any`, or give widths at equal distances"),
    )  # fmt: skip

    target: Annotated[float, Field(gt=0)] = 3.0
    """Bits per weight on average over the targets (scales not counted)."""

    bits: Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], Field(min_length=2)] = (
        2, 3, 4, 5, 6)  # fmt: skip
    """Widths to choose from, ascending."""

    quantizer: str = "quantize.gptq"
    """Pass that quantizes: any with the options `bits` and `targets` that leaves inputs alone."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Its other options."""

    exchange: Literal["size", "any"] = "size"
    """Which layers give each other bits: those with equally many weights (`size`), which keeps the
    average exactly; or `any`, which keeps it from above."""

    generations: Annotated[int, Field(ge=1)] = 150
    """Generations of the evolution."""

    offspring: Annotated[int, Field(ge=1)] = 128
    """Candidates made in every generation."""

    survivors: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (16, 4, 1)
    """Candidates that are left behind every stage of selection."""

    tokens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (
        2048, 16384, 131072)  # fmt: skip
    """Rows of the output (tokens of text, else samples) that a stage looks at: drawn anew from the
    calibration data in every generation, all of it where there is less."""

    @model_validator(mode="after")
    def _quantizer_takes_its_options(self) -> Self:
        fits("quantizer", lambda: self.quantizer_of(self.bits[0]))
        return self

    def quantizer_of(self, bits: int) -> Pass:
        """The pass that quantizes the targets to so many bits.

        Raises:
            ArgumentError: there is none of that name, or it does not take the options.
        """
        given = {**self.options, "bits": bits, "targets": list(self.targets)}
        return inner_pass(self.quantizer, ("bits", "targets"), given,
                          "Use quantize.gptq, quantize.rtn or quantize.awq.")  # fmt: skip


class Bits(Pass[BitsOptions]):
    """Quantizes the program once per width, and finds which layer gets which by evolution.

    All layers begin at the target's width. In every generation children of the best mixture so far
    are made, in which some layers have a step more and as many others a step less, so that the
    size stays what it is; they are judged by the divergence of the program's outputs on a small
    sample, the best of them on a larger one, and at last, together with their parent, on the
    largest. No assumption is made that errors of layers add up, or that less error in a layer is
    less error in the program; where they do add up, `quantize.bit_allocation` solves it exactly.

    Peak memory: the program once per width, in codes and, for the trials, in floats.

    Source: Sieberling et al. 2024, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
    Search" (P86), algorithms 1 and 2, with the released settings. Every width is calibrated behind
    layers of its own width; the released database has them all behind layers of the target's.
    """

    contract = "lossy"
    stored_bits = "bits"
    takes = MATRICES
    codes = MATRICES
    stores_weights = True
    needs = "calibration"
    papers = ("P86",)
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def cost(self, load: Load) -> Work:
        work = super().cost(load)
        for bits in self.options.bits:
            work += self.options.quantizer_of(bits).cost(load)
        return work + evolution(load, self.options, self.options.generations)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options

        def quantized(bits: int) -> Program:
            context.progress(f"{bits} bits", o.bits.index(bits), len(o.bits))
            return o.quantizer_of(bits).run(program, context.within(bits)).program

        database = Database(program, quantized, o.bits, o.targets,
                            by_size=o.exchange == "size", by=self.id)  # fmt: skip
        units = database.units
        weights = sum(unit.costs[0] for unit in units) // o.bits[0]
        budget = math.floor(o.target * weights)
        search = Search(database, program, o, context, self.id)
        above = next(i for i, bits in enumerate(o.bits) if bits >= o.target)
        uniform = (above,) * len(units)
        rng = search.rng("start")
        start = search.best_of([lowered(units, uniform, budget, rng) for _ in range(o.offspring)])

        def mutate(levels: Levels, rng: Any) -> Levels | None:
            if o.exchange == "size":
                return switched(units, levels, rng)
            return rebalanced(units, levels, budget, rng)

        found = search.run(start, mutate, o.generations)
        actions = [Action(name, f"{o.bits[level]} bits")
                   for unit, level in zip(units, found.levels, strict=True)
                   for name in unit.layers]  # fmt: skip
        metrics = {**found.metrics, "bits": found.metrics["cost"] / weights}
        return Result(found.program, (*actions, *found.notes), metrics)
