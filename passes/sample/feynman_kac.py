"""sample.feynman_kac: weighted particles, so that guidance has the target it stands for (P35)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.guidance import Weighted
from graphwright.ir.sampling.record import Denoiser
from graphwright.passes.base import Context
from graphwright.passes.sample._form.guider import GuiderPass

RATE = "weight_rate"


class FeynmanKacOptions(Options):
    """Options of sample.feynman_kac."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("other_exponent", "exponent + other_exponent > 0",
             "exponent ({exponent}) and other_exponent ({other_exponent}) have to add up to more "
             "than 0, or the target has no integral"),
    )  # fmt: skip

    exponent: float = 2.0
    """b of p_with^b p_without^c, the target."""

    other_exponent: float = -1.0
    """c of it: 1 - b for guidance of the scale b, 0 for annealing, 1 beside 1 for a product of
    both."""

    resample_below: Annotated[float, Field(gt=0)] = 0.5
    """Share of a sample's particles: where fewer count, they are resampled. Above 1 every step."""


class FeynmanKac(GuiderPass[FeynmanKacOptions]):
    """Simulates a mixed score and weighs particles by how far that is from the mixed density.

    A guided score is not that of p_with^b p_without^(1-b) at any level of noise but the last. The
    program returns, beside D and E of the mixed score, the rate of every particle's log-weight; the
    driver adds it up along the reverse SDE and resamples the `particles` of a sample, together with
    all that they carry. Particles begin with the variance of the target, that of the noise over the
    sum of the exponents. `sample` resamples what it returns by the log-weights that are left; a
    loop of one's own finds them in the state (`log_weights`).

    Source: P35. The rate for any exponents follows from the Fokker-Planck equations of the scores;
    its special cases are the paper's guidance, annealing and product of experts. The noise scaling
    of its annealing family is not here.
    """

    papers = ("P35",)
    looked_at: ClassVar[Mapping[str, str]] = {RATE: "batch"}

    def guider(self, record: Denoiser) -> nn.Module:
        """The guider."""
        return Weighted()

    def parameters(self) -> dict[str, float]:
        """The exponents."""
        return {
            "exponent": self.options.exponent,
            "other_exponent": self.options.other_exponent,
        }

    def settings(self, context: Context, program: Program) -> dict[str, Any]:
        """When to resample."""
        return {"weights": {"output": RATE, "least": self.options.resample_below}}
