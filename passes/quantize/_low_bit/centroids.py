"""End-to-end training of what codes point to: codebooks and scales, with the codes as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor, nn

from graphwright.ir.edit import Editor
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.stored.representation import Representation
from graphwright.ir.tune import History, Hook, Moment, TuneOptions, tune
from graphwright.ir.tune.hooks import Values
from graphwright.passes.base import Context

TRIED = 2
"""Steps that the time of a step is measured on: the second one."""


def tune_centroids(
    program: Program, layers: Sequence[Layer], options: TuneOptions, context: Context
) -> tuple[Program, History]:
    """The program with the floating-point parts of coded weights trained, all together.

    They are trained in float32, and stored in the type that they had. How long it will take is
    measured on two steps that are thrown away, and said through `context.progress` before it
    starts.

    Args:
        program: left as it is.
        layers: whose weights are rebuilt from codes.
        options: of training; the teacher is the context's.
        context: with training data.
    """
    names: dict[str, Tensor] = {}
    for layer in layers:
        for name in Representation(program, weight_node(layer)).continuous:
            names[name] = program.state[name]
    editor = Editor(program, by="quantize.vptq")
    for name, old in names.items():
        editor.set_state(name, nn.Parameter(old.detach().float().clone()))
    twin = editor.finish()
    clock = _Clock()
    trial = options.model_copy(update={"steps": TRIED, "epochs": None, "warmup": 0})
    tune(twin, context.training_data, trial, context.within("estimate").replace(work=None),
         hooks=[clock], names=set(names))  # fmt: skip
    said = _Estimate(clock.seconds, context)
    tuned = tune(twin, context.training_data, options, context, hooks=[said], names=set(names))
    state = dict(program.state)
    for name, old in names.items():
        state[name] = tuned.program.state[name].detach().to(old.dtype)
    return program.replace(state=state), tuned.history


class _Clock(Hook):
    """Seconds between the ends of the last two steps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.perf_counter()

    def after_step(self, at: Moment) -> None:
        now = time.perf_counter()
        self.seconds, self._last = now - self._last, now


class _Estimate(Hook):
    """Says before the first step how long all of them will take."""

    def __init__(self, seconds: float, context: Context) -> None:
        self.seconds, self.context, self.is_said = seconds, context, False

    def on_parameters(self, at: Moment, values: Values) -> Values:
        if not self.is_said:
            self.is_said = True
            left = self.seconds * (at.total - at.step)
            what = f"end-to-end tuning, about {left:.0f} s for {at.total - at.step} steps"
            self.context.progress(what, at.step, at.total)
        return values
