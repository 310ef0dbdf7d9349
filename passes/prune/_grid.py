"""Symmetric integer grids of 2 to 8 bits, one scale per output channel."""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = tuple(1 - step / 100 for step in range(60))
"""Scales that a search tries, as shares of the one that reaches the largest weight."""


def grid_codes(rows: Tensor, bits: int, search: bool = False) -> tuple[Tensor, Tensor]:
    """Codes in [-(2^(bits-1) - 1), 2^(bits-1) - 1] and a scale per row.

    Args:
        rows: (out, k) floating point.
        bits: 2 to 8.
        search: try smaller scales, down to 0.4 of the largest, for least squared error.

    Returns:
        codes int8 (out, k), and scales (out,) float32, positive; 1 for a row of zeros.
    """
    largest = 2 ** (bits - 1) - 1
    peak = rows.abs().amax(1)
    base = torch.where(peak > 0, peak / largest, torch.ones_like(peak)).float()
    base = base.clamp(min=torch.finfo(torch.float32).tiny)
    best, error = base, torch.full_like(base, float("inf"))
    for share in SHARES if search else (1.0,):
        scale = base * share
        gap = _codes(rows, scale, largest) * scale[:, None].to(rows.dtype) - rows
        found = gap.square().sum(1).float()
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    return _codes(rows, best, largest).to(torch.int8), best


def _codes(rows: Tensor, scale: Tensor, largest: int) -> Tensor:
    return torch.round(rows / scale[:, None].to(rows.dtype)).clamp(-largest, largest)


def rounded(rows: Tensor, bits: int, search: bool = False) -> Tensor:
    """The rows that the codes stand for, in the dtype of `rows`."""
    codes, scale = grid_codes(rows, bits, search)
    return codes.to(rows.dtype) * scale[:, None].to(rows.dtype)
