"""tune.finetune: trains a program on labelled data, or to follow the original model."""

from __future__ import annotations

from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of


class FinetuneOptions(Bounded):
    """Options of tune.finetune."""

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer, such as a class token, goes by its own name."""

    tune: TuneOptions = TuneOptions()
    """Options of training."""


class Finetune(Pass[FinetuneOptions]):
    """Trains the parameters of the chosen layers, in training mode: dropout and batch statistics.

    Behind a pass that lost accuracy (pruning, factorizing) it wins it back; `tune: {loss: kl}`
    needs no labels and follows the model as it was before the first pass. Zeros that a mask left in
    weights stay zero (`tune: {keep_zeros: auto}`). Parameters that the model froze stay frozen.
    """

    contract = "lossy"
    needs = "training"
    computes_in = ("float64", "float32", "bfloat16")  # in float16, updates round to nothing

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        chosen = chosen_parameters(program, options.targets, self.id)
        tuned = tune(
            program, context.training_data, options.tune, context, names=chosen.names,
            hooks=training_hooks(program),
        )  # fmt: skip
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics_of(tuned.history))
