"""resize.assemble: a lighter network from units of a big one, distilled from it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.trunk.units import Unit, chosen_units, find_units, without
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.features import Features
from graphwright.ir.tune.losses import OF_TEACHER
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.resize._units.conditional import add_experts

Factor = Annotated[float, Field(ge=0)]


class AssembleOptions(Bounded):
    """Options of resize.assemble."""

    drop: Annotated[tuple[str, ...], Field(examples=[["blocks.1"]])] = ()
    """Residual units that go: patterns over their names, the blocks that they are of, or layers in
    them. When empty, `macs` chooses."""

    macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the multiply-accumulates that goes, at least: units with the most of them per
    parameter first, which are those at high resolution."""

    experts: Annotated[int, Field(ge=2)] | None = None
    """Kernels of a mixture in the place of the convolutions of `experts_at`; none when absent."""

    experts_at: Selector = ()
    """Convolutions that become mixtures: selector patterns over names and kinds."""

    output: Factor | Literal["auto"] = "auto"
    """Factor of the distance to the big network's outputs in the loss. `auto` is 1, and 0 where the
    loss of `tune` already is that distance."""

    feature: Factor = 1.0
    """Factor of the distances to the big network's values behind the units that stay."""

    tune: TuneOptions = TuneOptions(loss="teacher_mse")
    """Options of training; its loss is that of the task."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("macs", "('drop' in given) != ('macs' in given)", "give one of drop and macs"),
        Rule("experts_at", "('experts' in given) == ('experts_at' in given)",
             "experts and experts_at belong together"),
    )  # fmt: skip


class Assemble(Pass[AssembleOptions]):
    """Drops residual units, and distils what is left from the program as it was.

    A unit y = x + f(x) goes and leaves x, so that all other layers keep their weights. A unit whose
    skip has a projection stays: it changes the width or the resolution. Convolutions may become
    mixtures of experts, which give back capacity: their kernels are mixed before the convolution
    where the program is of one sample, and behind it otherwise.

    Loss: that of `tune` + `output` * mse of the outputs + `feature` * sum over the units that stay
    of the mse of their results.

    Source: P21 ("A-SDM", its model assembly and ME-CondConv), whose code is not public: the terms
    of the loss with factors of 1 follow Kim et al. 2023, "BK-SDM", on which it builds.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    papers = ("P21",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        units = find_units(program)
        total = sum(unit.macs for unit in units)
        gone = chosen_units(units, o.drop) if o.drop else _cheapest(program, units, o.macs or 0)
        light = without(program, gone, self.id)
        mixed: list[Action] = []
        if o.experts is not None:
            generator = context.generator("experts")
            light, mixed = add_experts(light, o.experts_at, o.experts, generator, self.id)
        kept = [unit for unit in units if unit not in gone]
        alive = {node.name for node in light.graph.nodes}
        pairs = [(unit.join, unit.join) for unit in kept if unit.join in alive]
        output = o.output
        if output == "auto":
            output = 0.0 if o.tune.loss in OF_TEACHER else 1.0
        hook = Features(program, pairs if o.feature else [], output=output, feature=o.feature)
        tuned = tune(light, context.training_data, o.tune, context, hooks=[hook], teacher=program)
        actions = [Action(unit.name, _lost(unit)) if unit in gone
                   else Action.left(unit.name, "stays", "trained") for unit in units]  # fmt: skip
        metrics = {
            "units_gone": float(len(gone)),
            "macs_of_units_gone": sum(unit.macs for unit in gone) / total if total else 0.0,
            "first_loss": tuned.history.losses[0], "last_loss": tuned.history.losses[-1],
        }  # fmt: skip
        return Result(tuned.program, (*actions, *mixed), metrics)


def _cheapest(program: Program, units: list[Unit], share: float) -> list[Unit]:
    """Units with the most multiply-accumulates per parameter, until a share of all is reached."""
    from graphwright.ir.graph.cost import cost

    wanted = share * (cost(program).macs or 0)
    found: list[Unit] = []
    for unit in sorted(units, key=lambda u: u.macs / max(u.parameters, 1), reverse=True):
        if sum(u.macs for u in found) >= wanted:
            break
        found.append(unit)
    reached = sum(u.macs for u in found)
    if reached < wanted:
        raise ModelError(
            f"all {len(units)} residual units that can go have {reached / (wanted / share):.1%} of "
            f"the multiply-accumulates, fewer than {share:.1%}",
            fix="Lower macs.",
        )
    return [unit for unit in units if unit in found]


def _lost(unit: Unit) -> str:
    return f"gone: {unit.macs:,} multiply-accumulates, {unit.parameters:,} parameters"
