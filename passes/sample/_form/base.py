"""The base of passes that turn a denoiser into another sampling program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import TypeVar

import graphwright.ir.ops  # noqa: F401  registers graphwright::fake_quantize_dynamic
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Contract, Effect, Pass

OptionsT = TypeVar("OptionsT", bound=Options, default=Options)

DYNAMIC = torch.ops.graphwright.fake_quantize_dynamic.default
Named = Mapping[str, Tensor]
Run = Callable[[Named], Named]

OTHER_FAMILIES = (
    "adapt.*", "cast.*", "cleanup.*", "compensate.*", "decompose.*", "fuse.*", "insert.*",
    "prune.*", "quantize.*", "reparameterize.*", "resize.*", "tune.*",
)  # fmt: skip
"""Passes of a network: in front of those of its sampling, where data has the network's inputs."""


def runs_of_rows(
    after: Program, run: Run, parts: Sequence[Named], rows: Collection[str]
) -> list[Named]:
    """What the program before says to each of the parts, asked one by one.

    Where a network finds ranges of activations as it runs (quantize.int8), rows that are asked
    together share them. That is then what the pass promises: one call on all rows.

    Args:
        after: the pass's result.
        run: of the program before.
        parts: its inputs, all of one size.
        rows: those with a row per sample.
    """
    if not after.graph.find_nodes(op="call_function", target=DYNAMIC):
        return [run(part) for part in parts]
    joined = {
        name: torch.cat([part[name] for part in parts]) if name in rows else tensor
        for name, tensor in parts[0].items()
    }
    found = {name: value.chunk(len(parts)) for name, value in run(joined).items()}
    return [{name: each[k] for name, each in found.items()} for k in range(len(parts))]


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
