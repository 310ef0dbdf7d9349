"""The base of passes that turn a denoiser into another sampling program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import TypeVar

from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Contract, Effect, Pass

OptionsT = TypeVar("OptionsT", bound=Options, default=Options)

Named = Mapping[str, Tensor]
Run = Callable[[Named], Named]

OTHER_FAMILIES = (
    "adapt.*", "cast.*", "cleanup.*", "compensate.*", "decompose.*", "fuse.*", "insert.*",
    "prune.*", "quantize.*", "reparameterize.*", "resize.*", "tune.*",
)  # fmt: skip
"""Passes of a network: in front of those of its sampling, where data has the network's inputs."""


class SamplePass(Pass[OptionsT]):
    """A pass of the family sample: the weights stay, inputs and outputs are others."""

    contract: ClassVar[Contract] = "exact"
    weights: ClassVar[Effect | None] = "kept"
    restates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = OTHER_FAMILIES
    computes_in: ClassVar[tuple[str, ...]] = ("float64", "float32")

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """What the result computes; every pass says it."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")
