"""Integer arithmetic of quantization: scales, codes and their errors. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

INT8 = 127
"""Largest weight code; -128 is left out, so that the grid is symmetric."""

PAIR = 128
"""Largest sum of two codes of one sign that, times 255, fits a signed 16-bit sum."""

SMALLER = tuple(torch.linspace(0.98, 0.6, 20).tolist())
"""Shares of a scale that the estimate `mse` tries."""

WIDER = torch.linspace(1.0, 2.0, 17)
"""Multiples of a scale that are tried where codes would overflow; at twice no pair does."""

FEW = 512
"""Channels of so many weights are coded at every scale; for longer ones errors are estimated."""

CHUNK = 1 << 20
"""Weights that are coded at a time, which keeps temporaries in the cache."""

INT32 = 2**31 - 1


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Per-channel values (n,) shaped to broadcast along `axis` of a tensor of that rank."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def weight_codes(w: Tensor, scale: Tensor, axis: int, largest: int = INT8) -> Tensor:
    """int8 codes in [-largest, largest]: round_half_even(w / scale)."""
    codes = torch.round(w / along(scale, axis, w.dim()))
    return codes.clamp(-largest, largest).to(torch.int8)


def quantize_weight(
    w: Tensor,
    axis: int,
    estimate: str = "min_max",
    hold_pairs: bool = False,
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes and the scale of every channel of `axis`.

    CPUs without VNNI instructions add neighbouring products with uint8 along the inner dimension
    in 16 bits, with saturation: 255 (|a| + |b|) must stay below 2**15 wherever neighbours a and b
    have one sign. The inner dimension of a convolution is the windows' places, and the input
    channels within each: ONNX Runtime sums in this order whatever the layout.

    Args:
        w: any shape, float32; (out, in, ...) for a convolution.
        axis: the channels' axis.
        estimate: `min_max` (max|w| / 127) or `mse` (also tries smaller scales, down to 0.6 of it,
            and takes the least squared rounding and clipping error).
        hold_pairs: move pairs of codes that could overflow to the nearest that cannot. Where a
            channel has such pairs, larger scales, up to twice, are tried too, and the least
            squared error is taken.
        floor: (channels,) least scale, or None.

    Returns:
        codes int8 in [-127, 127], and scales (channels,) float32, positive; 1 for a channel of
        zeros.
    """
    rows = w if axis % w.dim() == 0 else w.movedim(axis, 0)
    if rows.dim() > 2:
        rows = rows.movedim(1, -1)
    flat = rows.reshape(rows.shape[0], -1)
    codes = torch.empty(flat.shape, dtype=torch.int8)
    scale = torch.empty(flat.shape[0])
    step = max(1, CHUNK // max(flat.shape[1], 1))
    for i in range(0, flat.shape[0], step):
        part = slice(i, i + step)
        least = None if floor is None else floor[part]
        codes[part], scale[part] = _rows(flat[part], estimate, hold_pairs, least)
    shaped = codes.reshape(rows.shape)
    if rows.dim() > 2:
        shaped = shaped.movedim(-1, 1)
    return shaped.movedim(0, axis % w.dim()).contiguous(), scale


def _rows(
    flat: Tensor, estimate: str, hold_pairs: bool, floor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`quantize_weight` of (channels, n): codes and scales."""
    peak = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])
    scale = torch.where(peak > 0, peak / INT8, torch.ones_like(peak))
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    if floor is not None:
        scale = torch.maximum(scale, floor)
    codes, error = _coded(flat, scale)
    if estimate == "mse":
        codes, error, scale = _search_smaller(flat, codes, error, scale, floor)
    if hold_pairs:
        codes, scale = _held(flat, codes, error, scale)
    return codes.to(torch.int8), scale


def _coded(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of (channels, n) rows at one scale each, as floats, and every row's squared error."""
    codes = torch.round(rows / scale[:, None]).clamp_(-INT8, INT8)
    return codes, _error(rows, codes, scale)


def _error(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return (codes * scale[:, None]).sub_(rows).square_().sum(1)


def _search_smaller(
    rows: Tensor, codes: Tensor, error: Tensor, scale: Tensor, floor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, errors and scales with smaller scales where they lower the error."""
    base, scale = scale, scale.clone()
    # A channel drops out after two steps that were no better: the error has one valley.
    active, misses = torch.arange(len(rows)), torch.zeros(len(rows))
    for share in SMALLER:
        if not len(active):
            break
        tried = base[active] * share
        if floor is not None:
            tried = torch.maximum(tried, floor[active])
        new_codes, new_error = _coded(rows[active], tried)
        better = new_error < error[active]
        winners = active[better]
        scale[winners], error[winners] = tried[better], new_error[better]
        codes[winners] = new_codes[better]
        misses[active] = torch.where(better, 0.0, misses[active] + 1)
        active = active[misses[active] < 2]
    return codes, error, scale


def _held(rows: Tensor, codes: Tensor, error: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes without a pair that overflows, and their scales.

    Channels that have such a pair take the scale of `WIDER` that is best for them.
    """
    over = _overflowing(codes)
    row, place = over.nonzero(as_tuple=True)
    if not len(row):
        return codes, scale
    if rows.shape[1] <= FEW:
        tried = torch.stack([_fitted(rows, scale * multiple)[1] for multiple in WIDER], -1)
    else:
        tried = _estimated(rows, codes, error, scale, row, place)
    best = tried.argmin(1)
    _move(codes, row, place)
    wide = best.nonzero().squeeze(1)
    if len(wide):
        wider = scale[wide] * WIDER[best[wide]]
        new, new_error = _fitted(rows[wide], wider)
        is_better = new_error < _error(rows[wide], codes[wide], scale[wide])
        codes[wide[is_better]] = new[is_better]
        scale = scale.index_put((wide[is_better],), wider[is_better])
    return codes, scale


def _fitted(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As `_coded`, with the pairs that overflow moved."""
    codes, _ = _coded(rows, scale)
    _move(codes, *_overflowing(codes).nonzero(as_tuple=True))
    return codes, _error(rows, codes, scale)


def _estimated(
    rows: Tensor, codes: Tensor, error: Tensor, scale: Tensor, row: Tensor, place: Tensor
) -> Tensor:
    """Errors (channels, multiples) of the rows at every scale of `WIDER`.

    Few pairs overflow, and only they are coded at every scale: the rounding error of the other
    weights of a row grows with the square of the scale.

    Args:
        rows, codes, error, scale: the rows as they are coded now, with pairs that overflow.
        row, place: of those pairs.
    """
    pairs = _pairs(rows, row, place)
    free = (_pairs(codes, row, place) * scale[row, None] - pairs).square().sum(-1)
    others = error - torch.zeros_like(error).index_add_(0, row, free)
    total = others.clamp(min=0)[:, None] * WIDER.square()
    for i, multiple in enumerate(WIDER):
        steps = scale[row, None] * multiple
        tried = _moved(torch.round(pairs / steps).clamp_(-INT8, INT8))
        cost = (tried * steps - pairs).square().sum(-1)
        total[:, i].index_add_(0, row, cost)
    return total


def _overflowing(codes: Tensor) -> Tensor:
    """Pairs (channels, n // 2) that are beyond `PAIR`: two signs never are."""
    even = codes.shape[1] // 2 * 2
    return (codes[:, :even:2] + codes[:, 1:even:2]).abs() > PAIR


def _pairs(rows: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Pairs (.., 2) of the rows."""
    return torch.stack([rows[row, 2 * place], rows[row, 2 * place + 1]], -1)


def _move(codes: Tensor, row: Tensor, place: Tensor) -> None:
    """Moves pairs of codes to where they fit, in place."""
    fitted = _moved(_pairs(codes, row, place))
    codes[row, 2 * place], codes[row, 2 * place + 1] = fitted.unbind(-1)


def _moved(pairs: Tensor) -> Tensor:
    """Pairs of codes (.., 2) on their way to zero, as far as they have to go to fit."""
    excess = (pairs.sum(-1).abs() - PAIR).clamp(min=0)
    cut = torch.stack([torch.ceil(excess / 2), torch.floor(excess / 2)], -1)
    return pairs - pairs.sign() * cut


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
