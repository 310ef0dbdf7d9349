"""The base of recipes that make few-step generators out of denoisers."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import TypeVar

from graphwright.ir.options import Options
from graphwright.ir.tune.history import History
from graphwright.passes.base import Contract, Effect, Need, Pass

OptionsT = TypeVar("OptionsT", bound=Options, default=Options)


class DenoiserRecipe(Pass[OptionsT]):
    """A recipe behind `sample.denoiser`; guidance and reuse come behind it.

    Training data holds samples without noise under the name of the noisy input, and conditions;
    labels are not needed. A file also has the time input, whose values are not read.
    """

    contract: ClassVar[Contract] = "lossy"
    needs: ClassVar[Need] = "training"
    weights: ClassVar[Effect | None] = "trained"
    after: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    computes_in: ClassVar[tuple[str, ...]] = ("float64", "float32")


def course(history: History, prefix: str = "") -> dict[str, float]:
    """Figures of a training run for the report."""
    return {
        f"{prefix}steps": float(history.steps),
        f"{prefix}first_loss": history.losses[0],
        f"{prefix}last_loss": history.losses[-1],
    }
