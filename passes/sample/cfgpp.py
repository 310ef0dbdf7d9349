"""sample.cfgpp: guidance that stays on the manifold (P23)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from graphwright.ir.options import Options
from graphwright.ir.sampling.guidance import CfgPlusPlus
from graphwright.ir.sampling.record import Denoiser
from graphwright.passes.sample._form.guider import GuiderPass


class CfgppOptions(Options):
    """Options of sample.cfgpp."""

    guidance_scale: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Between the data without the condition (0) and with it (1)."""


class Cfgpp(GuiderPass[CfgppOptions]):
    """Heads for the guided data, and puts noise back in the direction without the condition.

    D and E are then of two predictions, so that every solver that takes two directions (euler,
    ddim, euler_ancestral, dpmpp_2m, dpmpp_2s) is its CFG++ form; the others are refused. For
    solvers of the first order it is sample.cfg with the scale
    guidance_scale * sigma_i / (sigma_i - sigma_{i+1}) at step i, sigma = s / a. A bundle's `invert`
    goes the steps backwards, from samples to their noise.

    Source: P23, algorithms 1 to 3, and its appendix for DPM-Solver++.
    """

    papers = ("P23",)
    two_directions: ClassVar[bool] = True

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        return CfgPlusPlus()

    def parameters(self) -> dict[str, float]:
        """The scale."""
        return {"guidance_scale": self.options.guidance_scale}
