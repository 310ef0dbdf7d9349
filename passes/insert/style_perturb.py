"""insert.style_perturb: adversarial noise on the styles of feature maps, in training alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._form.scopes import scope_output, select_scopes
from graphwright.passes.insert._form.style import Style, StyleHook
from graphwright.passes.training import TRAINING_ONLY


class StylePerturbOptions(Options):
    """Options of insert.style_perturb."""

    at: Annotated[tuple[str, ...], Field(min_length=1, examples=[["layer1", "layer2"]])]
    """Modules behind which maps are perturbed: globs over their names, as `layer[1-3]`."""

    methods: Annotated[tuple[Literal["none", "learned", "batch"], ...], Field(min_length=1)] = (
        "none", "learned", "batch",
    )  # fmt: skip
    """Each batch draws one of these at every place: no noise, noise of the learned scales, noise of
    the deviations that the statistics have over the batch."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the turned gradient of the scales."""


class StylePerturb(Pass[StylePerturbOptions]):
    """Perturbs the styles of feature maps while the network is tuned, and never else.

    The style of a map is the mean and the deviation of every channel. Here both get Gaussian noise
    whose scale is learned per channel to raise the loss, while the network learns to lower it: it
    gets to see styles that its training data lacks. The scales begin at the deviations that the
    statistics have over the first batch.

    The program itself stays as it is, node by node: `tune.finetune` later in the chain reads the
    record and trains with the noise; evaluations, artifacts and later passes have none of it.
    Batches need two samples or more.

    Source: P61, section 3.2. The scales take plain gradient steps of the optimizer's learning rate,
    without momentum and decay, as there; gradients are clipped together with the network's.
    """

    papers = ("P61",)
    contract: ClassVar[Contract] = "exact"
    weights: ClassVar[Effect | None] = "kept"
    before = ("tune.finetune",)

    def run(self, program: Program, context: Context) -> Result:
        """Records the places.

        Raises:
            ModelError: a pattern matches no module, or a module's output is no map (B, C, H, W).
            ArgumentError: the program has a record already.
        """
        options = self.options
        if self.id in program.facts.get(TRAINING_ONLY, {}):
            raise ArgumentError(f"{self.id}: the network's styles are perturbed already")
        channels: dict[str, int] = {}
        actions = []
        for name in select_scopes(program.graph, options.at, self.id):
            channels[name] = _channels(program, name, self.id)
            actions.append(Action(name, f"{channels[name]} channels perturbed in training"))
        editor = Editor(program, by=self.id)
        record = {**self.resolved_options(), "channels": channels}
        editor.facts[TRAINING_ONLY] = {**editor.facts.get(TRAINING_ONLY, {}), self.id: record}
        editor.changed = True
        return Result(editor.finish(), tuple(actions))

    @classmethod
    def training_only(cls, record: dict[str, Any]) -> list[Hook]:
        """The hook that trains with the noise of a record."""
        return [
            StyleHook({
                name: Style(name, channels, record["methods"], float(record["weight"]))
                for name, channels in record["channels"].items()
            })
        ]  # fmt: skip


def _channels(program: Program, name: str, by: str) -> int:
    node = scope_output(program.graph, name)
    if node is None:
        raise ModelError(
            f"{by}: the module {name!r} has not one output that is read outside of it",
            fix="Name a module that returns one feature map.",
        )
    value = node.meta["val"]
    if not (isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()):
        raise ModelError(
            f"{by}: the output of {name!r} is no feature map (batch, channels, height, width)",
            fix="Name a module that returns one.",
        )
    return int(value.shape[1])
