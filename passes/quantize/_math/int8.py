"""Integer arithmetic of quantization: scales, codes and their errors. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

INT8 = 127
"""Largest weight code; -128 is left out, so that the grid is symmetric."""

HALF = 64
"""Largest code of which two, times 255, still fit a signed 16-bit sum: 2 * 64 * 255 < 2**15."""

PAIR = 128
"""Largest sum of two codes of one sign, likewise."""

INT32 = 2**31 - 1


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Per-channel values (n,) shaped to broadcast along `axis` of a tensor of that rank."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def weight_codes(w: Tensor, scale: Tensor, axis: int, largest: int = INT8) -> Tensor:
    """int8 codes in [-largest, largest]: round_half_even(w / scale)."""
    codes = torch.round(w / along(scale, axis, w.dim()))
    return codes.clamp(-largest, largest).to(torch.int8)


def without_overflow(codes: Tensor, axis: int) -> Tensor:
    """Codes of a matrix whose products with uint8 cannot overflow 16-bit sums of two.

    CPUs without VNNI instructions add neighbouring products along the inner dimension in 16 bits,
    with saturation: 255 (|a| + |b|) must stay below 2**15 wherever a and b have one sign. Pairs
    beyond it are moved to the nearest pair that fits.

    Args:
        codes: (out, in) for axis 0, (in, out) for axis 1; int8.
        axis: the axis of the output channels.
    """
    rows = codes.to(torch.int16) if axis == 0 else codes.to(torch.int16).T
    width = rows.shape[1]
    pairs = torch.nn.functional.pad(rows, (0, width % 2)).reshape(rows.shape[0], -1, 2)
    size = pairs.abs()
    excess = torch.where(pairs[..., 0] * pairs[..., 1] > 0, size.sum(-1) - PAIR, 0).clamp(min=0)
    cut = torch.stack([(excess + 1) // 2, excess // 2], -1)
    fitted = (pairs.sign() * (size - cut)).reshape(rows.shape[0], -1)[:, :width].to(torch.int8)
    return (fitted if axis == 0 else fitted.T).contiguous()


def quantize_weight(
    w: Tensor,
    axis: int,
    estimate: str = "min_max",
    overflow: str = "any",
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes and the scale of every channel of `axis`.

    Args:
        w: any shape, float32.
        axis: the channels' axis.
        estimate: `min_max` (max|w| / 127) or `mse` (also tries smaller scales, down to 0.6 of it,
            and takes the least squared rounding and clipping error).
        overflow: `any` (nothing to hold), `pairs` (a matrix, see `without_overflow`; larger
            scales, up to twice, are tried and the least squared error is taken) or `half`
            (codes in [-64, 64], safe in any order of summation).
        floor: (channels,) least scale, or None.

    Returns:
        codes int8 in [-127, 127], and scales (channels,) float32, positive; 1 for a channel of
        zeros.
    """
    rows = w if axis % w.dim() == 0 else w.movedim(axis, 0)
    flat = rows.reshape(rows.shape[0], -1)
    largest = HALF if overflow == "half" else INT8
    peak = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
    base = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    base = base.clamp(min=torch.finfo(torch.float32).tiny)
    if floor is not None:
        base = torch.maximum(base, floor)
    codes, error = _coded(flat, base, largest, overflow)
    scale = base.clone()
    smaller = torch.linspace(0.98, 0.6, 20).tolist() if estimate == "mse" else []
    larger = torch.linspace(1.05, 2.0, 20).tolist() if overflow == "pairs" else []
    for shares in (smaller, larger):
        # A channel drops out after two steps that were no better: the error has one valley.
        active, misses = torch.arange(flat.shape[0]), torch.zeros(flat.shape[0])
        if shares is larger and larger:
            active = active[_overflows(flat, base, largest)]
        for share in shares:
            if not len(active):
                break
            tried = base[active] * share
            if floor is not None:
                tried = torch.maximum(tried, floor[active])
            new_codes, new_error = _coded(flat[active], tried, largest, overflow)
            better = new_error < error[active]
            winners = active[better]
            scale[winners], error[winners] = tried[better], new_error[better]
            codes[winners] = new_codes[better]
            misses[active] = torch.where(better, 0.0, misses[active] + 1)
            active = active[misses[active] < 2]
    shaped = codes.reshape(rows.shape)
    return (shaped if rows is w else shaped.movedim(0, axis)).contiguous(), scale


def _coded(rows: Tensor, scale: Tensor, largest: int, overflow: str) -> tuple[Tensor, Tensor]:
    """Codes of (channels, n) rows at one scale each, and every row's squared error."""
    codes = weight_codes(rows, scale, 0, largest)
    if overflow == "pairs":
        codes = without_overflow(codes, 0)
    error = (codes.to(rows.dtype) * scale[:, None] - rows).square().sum(1)
    return codes, error


def _overflows(rows: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Rows (bool) with a pair of codes that `without_overflow` has to move."""
    codes = weight_codes(rows, scale, 0, largest)
    return (without_overflow(codes, 0) != codes).any(1)


def activation_parameters(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of uint8 codes for [low, high], extended to hold zero.

    A range that is zero alone gets the scale 1: its codes are all the zero point.

    Returns:
        scale, rounded to float32 (what the runtime divides by), and zero point in [0, 255].
    """
    low, high = min(low, 0.0), max(high, 0.0)
    tiny = float(torch.finfo(torch.float32).tiny)
    scale = float(torch.tensor((high - low) / 255, dtype=torch.float32))
    if scale < tiny:
        return 1.0, 0
    zero_point = torch.round(torch.tensor(-low / scale, dtype=torch.float64)).clamp(0, 255)
    return scale, int(zero_point)


def least_scale(bias: Tensor, x_scale: float) -> Tensor:
    """Weight scales (channels,) below which bias / (x_scale * scale) would leave int32.

    Only channels whose weights are all but zero come near it.
    """
    return (bias.abs().double() / (x_scale * 0.5 * INT32)).float()


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """int32 codes of a bias (channels,) at scale x_scale * w_scale, zero point 0."""
    codes = torch.round(bias.double() / scale.double())
    return codes.clamp(-INT32, INT32).to(torch.int32)


def smoothing(low: Tensor, high: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant factors s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), clamped to 1e-5.

    Args:
        low, high: (in,) extremes of every input channel.
        weight: (in,) largest |w| of every input column over all layers that read the input.
        alpha: share of the difficulty that moves into the weights.

    Source: Xiao et al. 2023, "SmoothQuant", equation 4, and its code for the clamps.
    """
    reach = torch.maximum(high.abs(), low.abs()).clamp(min=1e-5)
    return (reach**alpha / weight.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
