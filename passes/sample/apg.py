"""sample.apg: adaptive projected guidance (P06)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import Apg as ApgGuider
from graphwright.ir.sampling.record import Carried, Denoiser
from graphwright.passes.base import Context
from graphwright.passes.sample._form.guider import GuiderPass
from graphwright.passes.sample._form.options import Interval


class ApgOptions(Interval):
    """Options of sample.apg."""

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """As in sample.cfg; this guider bears larger ones."""

    eta: float = 0.0
    """Share of the update that is parallel to the data with the condition; 1 keeps it."""

    momentum: Annotated[float, Field(gt=-1, lt=1)] = -0.5
    """Factor on the earlier updates; negative ones take away what was there before."""

    norm_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Largest length of an update, in the scale of the data; 0 for none."""


class Apg(GuiderPass[ApgOptions]):
    """Guides by an update without the part that only saturates.

    The update, the difference of the denoised predictions, is averaged with earlier ones, cut to a
    length, and the part of it along the data is left out. `momentum` goes from step to step as an
    input and an output; where a step is not guided, it is held. With `eta: 1`, `momentum: 0` and
    no threshold it is sample.cfg.

    diffusers' AdaptiveProjectedGuidance acts on the network's own output and adds the update to the
    prediction without the condition; the paper's algorithm, which this is, acts on the data and
    adds to the prediction with it.

    Source: P06, algorithm 1.
    """

    papers = ("P06",)
    carried: ClassVar[tuple[Carried, ...]] = (Carried("momentum", "next_momentum"),)

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        return ApgGuider()

    def parameters(self) -> dict[str, float]:
        """Its four numbers."""
        options = self.options
        bound = 0.0 if math.isinf(options.norm_threshold) else options.norm_threshold
        return {
            "guidance_scale": options.guidance_scale,
            "eta": options.eta,
            "momentum_factor": options.momentum,
            "norm_threshold": bound,
        }

    def settings(self, context: Context, program: Program) -> dict[str, Any]:
        """The interval."""
        return self.options.interval()
