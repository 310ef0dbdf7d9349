"""sample.cfg: classifier-free guidance."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import Cfg as CfgGuider
from graphwright.ir.sampling.record import Denoiser
from graphwright.passes.base import Context
from graphwright.passes.sample._form.guider import GuiderPass
from graphwright.passes.sample._form.options import Interval


class CfgOptions(Interval):
    """Options of sample.cfg."""

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """D = D_without + scale (D_with - D_without); 1 is no guidance. A trajectory may be given
    another one, and one for every step."""

    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share by which the standard deviation of the output is brought back to that with the
    condition."""


class Cfg(GuiderPass[CfgOptions]):
    """Guides by the difference between predictions with and without the condition.

    Both are one call of the network on twice the rows. Outside of `start` to `stop` of a
    trajectory the driver runs the network with the condition alone.

    Source: Ho and Salimans 2022; the interval is Kynkaanniemi et al. 2024, the rescaling Lin et al.
    2024, section 3.4, on the network's own output, as in diffusers.
    """

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        return CfgGuider(record.parameterization, record.sigma_data, self.options.guidance_rescale)

    def parameters(self) -> dict[str, float]:
        """The scale."""
        return {"guidance_scale": self.options.guidance_scale}

    def settings(self, context: Context, program: Program) -> dict[str, Any]:
        """The interval."""
        return self.options.interval()
