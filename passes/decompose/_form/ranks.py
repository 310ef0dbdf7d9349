"""The number of columns that two factors share, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program

Count = Annotated[int, Field(ge=1)]


class DecomposeOptions(Bounded):
    """Options of every pass that decomposes layers."""

    targets: Selector = ("*",)
    """Layers to decompose: selector patterns over names and kinds. The head of a language model is
    left alone unless it is named."""


class RankOptions(DecomposeOptions):
    """Options by which a rank is chosen."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("rank", "rank is None or energy is None",
             "rank and energy are two ways to say one thing: give one of them"),
        Rule("ratio", "'ratio' not in given or (rank is None and energy is None)",
             "ratio has no part where a rank or an energy is given"),
    )  # fmt: skip

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the parameters of every layer that goes, where neither rank nor energy is given."""

    rank: Count | None = None
    """Rank of every layer."""

    energy: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the sum of all squared singular values that the kept ones have at least."""

    ranks: dict[str, Count] = Field(default_factory=dict)
    """Ranks of single layers instead, by selector pattern; of several that fit, the last."""


def own_ranks(program: Program, ranks: dict[str, int], kinds: Sequence[str]) -> dict[str, int]:
    """The rank of every layer that a pattern names, by name.

    Raises:
        ModelError: a pattern matches no layer.
    """
    found: dict[str, int] = {}
    for pattern, rank in ranks.items():
        found |= {layer.name: rank for layer in select(program, [pattern], kinds)}
    return found


def choose_rank(options: RankOptions, s: Tensor, whole: int, per_rank: int) -> int:
    """The rank that the options ask for; at least 1.

    Args:
        options: rank, ratio or energy.
        s: singular values, largest first.
        whole: parameters of the weight.
        per_rank: parameters that one rank costs.
    """
    if options.rank is not None:
        return min(options.rank, len(s))
    if options.energy is None:
        return min(len(s), max(1, int((1 - options.ratio) * whole / per_rank + 1e-9)))
    squares = s.double().square().cumsum(0)
    reached = squares >= options.energy * squares[-1] * (1 - 1e-12)
    return int(torch.nonzero(reached)[0]) + 1


def names(layers: Sequence[Layer]) -> str:
    """The uses of one weight, for the report."""
    return ", ".join(dict.fromkeys(layer.name for layer in layers))
