"""sample.cfg: classifier-free guidance."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.diffusers import read_guider
from graphwright.ir.sampling.guidance import Cfg as CfgGuider
from graphwright.ir.sampling.record import Denoiser
from graphwright.passes.base import Context, Result
from graphwright.passes.sample._form.configuration import configuration
from graphwright.passes.sample._form.guider import GuiderPass
from graphwright.passes.sample._form.options import Interval

RESCALE = "guidance_rescale"
"""Entry of the settings of the guidance."""


class CfgOptions(Interval):
    """Options of sample.cfg."""

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """D = D_without + scale (D_with - D_without); 1 is no guidance. A trajectory may be given
    another one, and one for every step."""

    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share by which the standard deviation of the output is brought back to that with the
    condition."""

    guider: str | None = None
    """Path of a diffusers `guider_config.json` of ClassifierFreeGuidance, which then says the other
    options; `pipeline` is that of the pipeline's folder which the network came from."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Interval.rules,
        Rule(
            "guider",
            "guider is None or not {'guidance_scale', 'guidance_rescale', 'start', 'stop'} & given",
            "guider says all other options; leave them out",
        ),
    )


class Cfg(GuiderPass[CfgOptions]):
    """Guides by the difference between predictions with and without the condition.

    Both are one call of the network on twice the rows. Outside of `start` to `stop` of a
    trajectory the driver runs the network with the condition alone.

    Source: Ho and Salimans 2022; the interval is Kynkaanniemi et al. 2024, the rescaling Lin et al.
    2024, section 3.4, on the network's own output, as in diffusers.
    """

    def run(self, program: Program, context: Context) -> Result:
        """Puts the guider around the denoiser.

        Raises:
            ArgumentError: the guider's configuration is of another guider, or is not there.
        """
        named = self.options.guider
        if named is None:
            return super().run(program, context)
        found = read_guider(configuration("guider", named, context.folder, program))
        return Cfg(**found).run(program, context)

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        said = {} if record.guidance is None else record.guidance.settings
        rescale = said.get(RESCALE, self.options.guidance_rescale)
        return CfgGuider(record.parameterization, record.sigma_data, rescale)

    def parameters(self) -> dict[str, float]:
        """The scale."""
        return {"guidance_scale": self.options.guidance_scale}

    def settings(self, context: Context, program: Program) -> dict[str, Any]:
        """The interval and the rescaling."""
        return {**self.options.interval(), RESCALE: self.options.guidance_rescale}
