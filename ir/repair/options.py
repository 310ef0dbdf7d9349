"""Options that prune.udfc and quantize.udfc share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graphwright.ir.options import Bounded, Rule, Targets
from graphwright.ir.repair.closed_form import Repair

UNREAD = {"merge": ("offsets", "shrinkage"), "features": ("offsets",)}
"""Options that a repair does not read."""


class RepairOptions(Bounded, Targets):
    """Options of the repair of readers of damaged channels."""

    rules = tuple(
        Rule(name, f"{name!r} not in given or repair != {repair!r}",
             f"{name} has no part in repair {repair}")
        for repair, names in UNREAD.items()
        for name in names
    )  # fmt: skip

    repair: Literal[Repair, "merge"] = "auto"
    """The compensation of lost channels: `ridge`, any mixture of the kept ones, from the filters;
    `nonneg`, mixtures without negative coefficients; `features`, any mixture, fitted to activations
    on Gaussian inputs; `diagonal`, kept channels are only scaled (rounded weights); `auto`, all of
    these; `none`. Of every kind several strengths are tried, and what has the least error on other
    Gaussian inputs is taken, which may be to change nothing. Beside these `merge`, Neuron Merging,
    the method before this one: a lost channel goes into one kept channel, untried; for pruning
    only."""

    offsets: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the channels' offsets (biases, batch norm) beside that of their filters."""

    shrinkage: Annotated[float, Field(gt=0)] | None = None
    """How strongly mixtures are held to "change nothing", in units of the filters' mean square (of
    `features`, the activations'); absent, 0.01 to 100 are tried."""

    search_scale: bool = False
    """Try smaller scales of weight codes for least squared error; else the largest weight of every
    channel is on the grid."""
