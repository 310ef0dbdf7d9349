"""Changes of some of a layer's outputs, stored for these alone.

An adapter with `slots` has one change for every slice that was asked for: its parts hold rows for
the outputs of the slices alone, and `slots` (out, slices) says which row is whose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLOTS = "slots"
"""Name of the part."""


def make_slots(slices: Sequence[Tensor], out: int) -> Tensor:
    """(out, slices) int64: the row of every output in what is stored, one slice below the other;
    the number of all rows where a slice lacks the output.

    Args:
        slices: outputs of each, int64.
        out: outputs of the layer.
    """
    total = sum(len(channels) for channels in slices)
    slots = torch.full((out, len(slices)), total)
    start = 0
    for number, channels in enumerate(slices):
        slots[channels, number] = torch.arange(start, start + len(channels))
        start += len(channels)
    return slots


def spread(rows: Tensor, slots: Tensor) -> Tensor:
    """A change's second factor (out, slices * rank) from its rows (outputs of the slices, rank).

    Outputs that a slice lacks have zeros.
    """
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded[slots].flatten(1)


def spread_factors(factors: Tensor, slots: Tensor) -> Tensor:
    """Factors of all outputs (out,) from those of the slices; one where no slice has the output.

    Args:
        factors: (outputs of the slices,).
        slots: (out, slices).
    """
    padded = torch.cat([factors, factors.new_ones(1)])
    return padded[slots].prod(1)
