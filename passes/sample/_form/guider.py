"""The base of passes that put a guider around a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import TypeVar

from graphwright.ir.errors import ModelError
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.sampling.guided import guided
from graphwright.ir.sampling.record import (
    ALPHA,
    DENOISED,
    NEGATIVE,
    NOISE,
    PAIR,
    SIGMA,
    Carried,
    Denoiser,
)
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass, runs_of_rows

GUIDERS = (
    "sample.adaptive_guidance", "sample.apg", "sample.cfg", "sample.cfgpp",
    "sample.classifier_confusion", "sample.feynman_kac", "sample.linear_guidance",
    "sample.minority",
)  # fmt: skip
"""One of them can be around a denoiser."""

OF_PAIRS = ("sample.cfg", "sample.cfgpp")
"""Those that go by no length of a sample: behind sample.joint it is two pictures."""

OptionsT = TypeVar("OptionsT", bound=Options, default=Options)


class GuiderPass(SamplePass[OptionsT]):
    """Predictions with and without the condition in one call of the network, and a guider.

    Class attributes:
        carried: tensors that go from call to call.
        looked_at: outputs behind those, by name `batch` or `sample` for their shape.
        two_directions: D and E are of two predictions.
    """

    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = GUIDERS
    carried: ClassVar[tuple[Carried, ...]] = ()
    looked_at: ClassVar[Mapping[str, str]] = {}
    two_directions: ClassVar[bool] = False

    def guider(self, record: Denoiser) -> nn.Module:
        """The module of `ir/sampling/guidance.py`."""
        raise TypeError(f"{type(self).__name__} defines no guider")

    def parameters(self) -> dict[str, float]:
        """Inputs of no dimension with their defaults, in the guider's order."""
        raise TypeError(f"{type(self).__name__} defines no parameters")

    def settings(self, context: Context, program: Program) -> dict[str, Any]:
        """What the driver goes by."""
        return {}

    def run(self, program: Program, context: Context) -> Result:
        """Puts the guider around the denoiser."""
        record = Denoiser.required(program, self.id)
        if PAIR in record.settings and self.id not in OF_PAIRS:
            raise ModelError(
                f"{self.id} goes by lengths of a sample, and this one is two pictures",
                fix=f"Guide a pair by {' or '.join(OF_PAIRS)}.",
            )
        made = guided(
            program, self.guider(record), self.id,
            parameters=self.parameters(), carried=self.carried, looked_at=self.looked_at,
            settings=self.settings(context, program), two_directions=self.two_directions,
        )  # fmt: skip
        said = ", ".join(f"{name} {value:g}" for name, value in self.parameters().items())
        return Result(made, (Action("denoiser", f"guided in one call of twice the rows; {said}"),))

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The guider on two runs of the denoiser, one with and one without the condition."""
        record = Denoiser.required(after, self.id)
        assert record.guidance is not None
        others = dict(given)
        for name, fill in record.conditions.items():
            negative = given.get(NEGATIVE + name)
            others[name] = torch.full_like(given[name], fill or 0) if negative is None else negative
        (batch, *_), *_ = (s.shape for s in after.signature.inputs if s.name == record.sample)
        rows = [spec.name for spec in after.signature.inputs if spec.shape[:1] == (batch,)]
        with_condition, without = runs_of_rows(after, run, (given, others), rows)
        numbers = [given[name] for name in self.parameters()]
        states = [given[item.input] for item in self.carried]
        pairs = [part[name] for name in (DENOISED, NOISE) for part in (with_condition, without)]
        levels = (given[record.sample], given[ALPHA], given[SIGMA])
        found = self.guider(record)(*pairs, *levels, *numbers, *states)
        names = (DENOISED, NOISE, *(item.output for item in self.carried), *self.looked_at)
        return dict(zip(names, found, strict=True))
