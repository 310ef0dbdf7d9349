"""sample.adaptive_guidance: guidance until it changes nothing (P41)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import Adaptive
from graphwright.ir.sampling.record import Denoiser
from graphwright.passes.base import Context
from graphwright.passes.sample._form.guider import GuiderPass

SIMILARITY = "similarity"


class AdaptiveGuidanceOptions(Options):
    """Options of sample.adaptive_guidance."""

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """As in sample.cfg."""

    threshold: float = 0.991
    """Cosine of the two predictions from which on guidance ends; above 1 never."""

    similarity_space: Literal["epsilon", "x0", "velocity"] = "epsilon"
    """Predictions whose cosine is taken: of the noise as in the paper, of the data, or of the
    velocity. With networks of noise the first is near 1 from the start for large images; then the
    data says more."""


class AdaptiveGuidance(GuiderPass[AdaptiveGuidanceOptions]):
    """Classifier-free guidance that ends when both predictions point the same way.

    The program returns their cosine per sample; when the smallest of a batch reaches the threshold,
    the driver runs the network with the condition alone for the rest of the trajectory. Every step
    without guidance saves half of its evaluations.

    Source: P41, section 5.
    """

    papers = ("P41",)
    looked_at: ClassVar[Mapping[str, str]] = {SIMILARITY: "batch"}

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        return Adaptive(self.options.similarity_space)

    def parameters(self) -> dict[str, float]:
        """The scale."""
        return {"guidance_scale": self.options.guidance_scale}

    def settings(self, context: Context, program: Program) -> dict[str, Any]:
        """The threshold."""
        return {"ends_at": {"output": SIMILARITY, "threshold": self.options.threshold}}
