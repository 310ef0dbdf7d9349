"""prune.gradual: rounds of pruning and training up to a sparsity, with a choice of rewinding."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.data.batches import as_batches
from graphwright.ir.options import Bounded, Rule, Targets
from graphwright.ir.program import Program
from graphwright.ir.tune import History, TuneOptions, tune
from graphwright.ir.tune.zeros import zeros_to_keep
from graphwright.ir.work import Load, Work
from graphwright.passes.base import MATRICES, Action, Context, Pass, Result
from graphwright.passes.prune._masks.layers import maskable, share_of_zeros
from graphwright.passes.prune._masks.patterns import Pattern
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.prune.mfac import Mfac
from graphwright.passes.prune.sparsegpt import Sparsegpt
from graphwright.passes.prune.wanda import Wanda

Course = Literal["cubic", "linear", "exponential"]
BY: dict[str, type[Pass[Any]]] = {
    "magnitude": Magnitude, "wanda": Wanda, "sparsegpt": Sparsegpt, "mfac": Mfac,
}  # fmt: skip


class GradualOptions(Bounded, Targets):
    """Options of prune.gradual."""

    rules = (
        Rule("initial", "initial < sparsity", "initial {initial} is not below sparsity {sparsity}"),
        Rule("scope", "scope is None or score == 'magnitude'",
             "scope has no part in score {score}"),
        Rule("distribution",
             "distribution == 'uniform' or (score != 'mfac' and scope != 'global')",
             "distribution {distribution} has no part where all layers compete"),
        Rule("tune", "tune.get('keep_zeros') is not False",
             "gradual pruning keeps its zeros: leave out keep_zeros"),
    )  # fmt: skip

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of weights that are zero at the end."""

    initial: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that the course starts from."""

    rounds: Annotated[int, Field(ge=1)] = 8
    """Times that weights are pruned; each is followed by a training of its own."""

    course: Course = "cubic"
    """Sparsity s of round r of R: `cubic`, s_f + (s_i - s_f) (1 - r/R)^3; `linear`; or
    `exponential`, the same share of what is left in every round."""

    score: Literal["magnitude", "wanda", "sparsegpt", "mfac"] = "magnitude"
    """Pass that prunes in every round, with its own defaults. All but the first look at the
    calibration data, or at the training data where there is none."""

    scope: Literal["global", "layer", "row"] | None = None
    """For the score `magnitude`: weights that are compared with each other; a layer when absent."""

    distribution: Literal["uniform", "erk", "lamp", "owl"] = "uniform"
    """Sparsity of every layer, as in the pass of `score`."""

    rewind: Literal["none", "start"] = "none"
    """What training goes on from after a pruning: the weights as they are, with a learning rate
    that starts anew (`none`), or those that the pass was given, under the new mask (`start`). To
    rewind to an early point of a training, put tune.finetune with these steps in front."""

    tune: TuneOptions = TuneOptions()
    """Options of the training of one round; `keep_zeros` is on."""

    def course_of(self) -> tuple[float, ...]:
        """Sparsity of every round."""
        return tuple(
            sparsity_at(self.course, self.initial, self.sparsity, r / self.rounds)
            for r in range(1, self.rounds + 1)
        )


def sparsity_at(course: Course, initial: float, final: float, done: float) -> float:
    """Sparsity when the share `done` of the rounds is behind; exactly `final` at the end.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", equation 1 (cubic); Frankle & Carbin
    2019 (exponential: what is left shrinks by one factor).
    """
    if done >= 1:
        return final
    if course == "cubic":
        return final + (initial - final) * (1 - done) ** 3
    if course == "linear":
        return initial + (final - initial) * done
    return float(1 - (1 - initial) * ((1 - final) / (1 - initial)) ** done)


class Gradual(Pass[GradualOptions]):
    """Prunes in rounds to an ever higher sparsity, and trains the rest after each of them.

    Zeros of earlier rounds stay. With `rewind: start` it first trains the weights it was given,
    then every round prunes what training found, and trains again from the given weights under the
    new mask: iterative magnitude pruning, which finds lottery tickets. Otherwise the given program
    is pruned as it is, and learning rates rewind (`tune` starts anew in every round). Recipes of
    the papers leave the first and the last layer dense (`targets`), or prune them less.

    Source: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression" (course); Frankle & Carbin 2019, "The Lottery Ticket Hypothesis" (rewinding
    of weights); Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning"
    (rewinding of the learning rate).
    """

    contract = "lossy"
    takes = MATRICES
    needs = "training"
    computes_in = ("float64", "float32", "bfloat16")  # in float16, updates round to nothing
    before: ClassVar[tuple[str, ...]] = ("cleanup.fold_batch_norm",)  # training wants the norms

    def cost(self, load: Load) -> Work:
        return super().cost(load).times(self.options.rounds)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        layers, actions = maskable(program, o.targets, Pattern(o.sparsity))
        trained = [layer for layer in layers if layer.weight in program.trainable()]
        actions += [Action.left(layer.name, "its weight is frozen")
                    for layer in layers if layer not in trained]  # fmt: skip
        names = list(dict.fromkeys(layer.weight for layer in trained))
        targets = [layer.name for layer in trained]
        masked = {*names, *zeros_to_keep(program, list(program.trainable()), "auto")}
        keep = o.tune.model_copy(update={"keep_zeros": True})
        metrics, current = {}, program
        if o.rewind == "start":
            current, history = self._train(program, context.within("dense"), o.tune, masked)
            metrics["dense_last_loss"] = history.losses[-1]
        for number, share in enumerate(o.course_of(), 1):
            here = context.within("round", number)
            current = self._prune(current, here, share, targets)
            if o.rewind == "start":
                current = _rewound(program, current, names)
            current, history = self._train(current, here, keep, masked)
            metrics[f"round_{number}_sparsity"] = share_of_zeros(current, names)
            metrics[f"round_{number}_last_loss"] = history.losses[-1]
        metrics["sparsity"] = share_of_zeros(current, names)
        actions += [Action(layer.name, f"{share_of_zeros(current, [layer.weight]):.1%} zeros")
                    for layer in trained]  # fmt: skip
        return Result(current, tuple(actions), metrics)

    def _prune(
        self, program: Program, context: Context, share: float, targets: list[str]
    ) -> Program:
        o = self.options
        given: dict[str, Any] = {"sparsity": share, "targets": targets}
        for name, default in (("scope", None), ("distribution", "uniform")):
            if getattr(o, name) != default:
                given[name] = getattr(o, name)
        data = context.calibration
        if data is None:
            data = as_batches(context.training_data, program.signature)
        return BY[o.score](**given).run(program, context.replace(calibration=data)).program

    def _train(
        self, program: Program, context: Context, options: TuneOptions, masked: set[str]
    ) -> tuple[Program, History]:
        context = context.replace(key=f"{context.key} {self.options.model_dump_json()}")
        tuned = tune(program, context.training_data, options, context, masked=masked)
        return tuned.program, tuned.history


def _rewound(start: Program, pruned: Program, names: list[str]) -> Program:
    """The program of the start under the masks of another one, which are by weight name."""
    state: dict[str, Tensor] = dict(start.state)
    for name in names:
        old = start.state[name]
        value = old.detach().masked_fill(pruned.state[name].detach() == 0, 0.0)
        state[name] = nn.Parameter(value, old.requires_grad)
    return start.replace(state=state)
