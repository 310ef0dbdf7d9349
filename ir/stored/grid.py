"""Grids of integer codes: their scales and zero points, for groups of weights of any width."""

from __future__ import annotations

import torch
from torch import Tensor

POWER = 2.4
"""Exponent of the error that the search for a range lowers (Frantar et al. 2022, their code)."""

SHRINKS = 80
"""Ranges that the search tries: 1, 0.99, ... 0.21 of the full one."""


def fit(
    w: Tensor, bits: int, *, symmetric: bool = False, search: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group, the group's weights along the last axis.

    Asymmetric: the range [min(w, 0), max(w, 0)] gets all codes. Symmetric: [-max|w|, max|w|], and
    the zero point is 2^(bits-1). A group of zeros has the range [-1, 1]. Zero is always a code.

    Args:
        w: (..., n), a float type.
        bits: 2 to 8.
        symmetric: zero point in the middle.
        search: also try smaller ranges, down to 0.21 of it, and take the least sum |w - q|^2.4.

    Returns:
        scale, positive, and zero point, a whole number in [0, 2^bits - 1]; each (...), w's type.

    Source: Frantar et al. 2022, "GPTQ", its quantizer.
    """
    high, low = w.amax(-1).clamp(min=0), w.amin(-1).clamp(max=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    high, low = torch.where(empty, 1.0, high), torch.where(empty, -1.0, low)
    scale, zero = _parameters(low, high, bits, symmetric)
    if not search:
        return scale, zero
    best = _error(w, scale, zero, bits)
    for step in range(1, SHRINKS):
        share = 1 - step / 100
        other = _parameters(low * share, high * share, bits, symmetric)
        error = _error(w, *other, bits)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, other[0], scale), torch.where(better, other[1], zero)
    return scale, zero


def _parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    largest = 2**bits - 1
    scale = ((high - low) / largest).clamp(min=torch.finfo(low.dtype).tiny)
    if symmetric:
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))
    return scale, torch.round(-low / scale).clamp(0, largest)


def _error(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    value = decode(encode(w, scale[..., None], zero[..., None], bits), scale[..., None],
                   zero[..., None])  # fmt: skip
    return (value - w).abs().pow(POWER).sum(-1)


def encode(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes, as floats: clamp(round_half_even(w / scale) + zero, 0, 2^bits - 1)."""
    return torch.clamp(torch.round(w / scale) + zero, 0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights that codes stand for: (codes - zero) * scale."""
    return (codes - zero) * scale


def grouped(w: Tensor, block: int) -> Tensor:
    """(rows, columns) as (rows, groups, block); a last group that is short is filled with zeros.

    Zeros change no range, for every range holds zero.
    """
    short = -w.shape[-1] % block
    wide: Tensor = torch.nn.functional.pad(w, (0, short)).unflatten(-1, (-1, block))
    return wide


def spread(values: Tensor, block: int, columns: int) -> Tensor:
    """One value per group, (rows, groups), as one per column, (rows, columns)."""
    return values.repeat_interleave(block, dim=-1)[..., :columns]


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
        gap = _symmetric(rows, scale, largest) * scale[:, None].to(rows.dtype) - rows
        found = gap.square().sum(1).float()
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    return _symmetric(rows, best, largest).to(torch.int8), best


def _symmetric(rows: Tensor, scale: Tensor, largest: int) -> Tensor:
    return torch.round(rows / scale[:, None].to(rows.dtype)).clamp(-largest, largest)


def rounded(rows: Tensor, bits: int, search: bool = False) -> Tensor:
    """The rows that the codes stand for, in the dtype of `rows`."""
    codes, scale = grid_codes(rows, bits, search)
    return codes.to(rows.dtype) * scale[:, None].to(rows.dtype)
