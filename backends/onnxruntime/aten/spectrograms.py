"""Short-time Fourier transforms and their inverses, as convolutions with windowed waves."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.complex_numbers import Pair, pair_of
from graphwright.backends.onnxruntime.aten.fourier import basis, mirrored
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


def _window(e: Emitter, n_fft: int, win_length: int | None, window: fx.Node | None) -> ir.Value:
    """(n_fft,) float64: the window, zeros around it where it is shorter."""
    width = n_fft if win_length is None else win_length
    if window is None:
        value = e.op("Expand", e.constant(1.0, torch.float64), e.ints(width))
    else:
        value = e.tensor(window, torch.float64)
    left = (n_fft - width) // 2
    if width == n_fft:
        return value  # type: ignore[no-any-return]
    pads = e.ints(left, n_fft - width - left)
    return e.op("Pad", value, pads, e.constant(0.0, torch.float64))  # type: ignore[no-any-return]


@translates(aten.stft.default)
def stft(
    e: Emitter, node: fx.Node, x: Any, n_fft: int, hop_length: int | None = None,
    win_length: int | None = None, window: Any = None, normalized: bool = False,
    onesided: bool | None = None, return_complex: bool | None = None, align_to_window: Any = None,
) -> Any:  # fmt: skip
    if x.meta["val"].dtype != torch.float32 or align_to_window:
        raise Untranslatable(node, "of this dtype, or aligned to its window")
    hop = n_fft // 4 if hop_length is None else hop_length
    frequencies = n_fft if onesided is False else n_fft // 2 + 1
    weight = _window(e, n_fft, win_length, window)
    if normalized:
        weight = e.op("Mul", weight, e.constant(n_fft**-0.5, torch.float64))
    cos, sin = basis(e, e.ints(frequencies), e.ints(n_fft), e.ints(n_fft))
    waves = e.op("Concat", cos, e.op("Neg", sin), axis=0)
    kernel = e.cast(e.op("Mul", waves, weight), torch.float64, torch.float32)
    batched = x.meta["val"].dim() == 2
    signal = e.op("Unsqueeze", e.values[x], e.ints(1) if batched else e.ints(0, 1))
    found = e.op("Conv", signal, e.op("Unsqueeze", kernel, e.ints(1)), strides=[hop])
    parts = e.multi("Split", 2, found, axis=1, num_outputs=2)
    parts = parts if batched else [e.op("Squeeze", part, e.ints(0)) for part in parts]
    if node.meta["val"].dtype.is_complex:
        return Pair(*parts)
    return e.op("Concat", *[e.op("Unsqueeze", part, e.ints(-1)) for part in parts], axis=-1)


@translates(aten.istft.default)
def istft(
    e: Emitter, node: fx.Node, x: Any, n_fft: int, hop_length: int | None = None,
    win_length: int | None = None, window: Any = None, center: bool = True,
    normalized: bool = False, onesided: bool | None = None, length: Any = None,
    return_complex: bool = False,
) -> Any:  # fmt: skip
    if onesided is False or return_complex or x.meta["val"].dtype != torch.complex64:
        raise Untranslatable(node, "two-sided, complex, or of another dtype")
    hop = n_fft // 4 if hop_length is None else hop_length
    frequencies, count = e.ints(n_fft // 2 + 1), e.ints(n_fft)
    weight = _window(e, n_fft, win_length, window)
    scale = n_fft**-0.5 if normalized else 1 / n_fft
    share = e.op("Mul", mirrored(e, frequencies, count), e.constant(scale, torch.float64))
    cos, sin = basis(e, frequencies, count, count)
    waves = e.op("Concat", e.op("Mul", cos, share), e.op("Neg", e.op("Mul", sin, share)), axis=0)
    kernel = e.cast(e.op("Mul", waves, weight), torch.float64, torch.float32)
    batched = x.meta["val"].dim() == 3
    axis = 1 if batched else 0
    spectrum = e.op("Concat", *pair_of(e, x), axis=axis)
    spectrum = spectrum if batched else e.op("Unsqueeze", spectrum, e.ints(0))
    summed = e.op("ConvTranspose", spectrum, e.op("Unsqueeze", kernel, e.ints(1)), strides=[hop])
    # Every sample is divided by the squares of the windows that cover it.
    frames = sizes_of(x)[-1]
    shape = e.shape([1, 1, frames])
    ones = e.op("Expand", e.constant(1.0, torch.float32), shape)
    square = e.cast(e.op("Mul", weight, weight), torch.float64, torch.float32)
    square = e.op("Unsqueeze", square, e.ints(0, 1))
    cover = e.op("ConvTranspose", ones, square, strides=[hop])
    start = n_fft // 2 if center else 0
    want = sizes_of(node)[-1]
    end = e.op("Add", e.ints(want) if isinstance(want, int) else e.size_of(want), e.ints(start))
    span = (e.ints(start), end, e.ints(2))
    signal = e.op("Div", e.op("Slice", summed, *span), e.op("Slice", cover, *span))
    signal = e.op("Squeeze", signal, e.ints(1) if batched else e.ints(0, 1))
    return _filled_up(e, signal, want, axis=1 if batched else 0)


def _filled_up(e: Emitter, signal: ir.Value, want: Any, axis: int) -> ir.Value:
    """Zeros behind a signal that is shorter than was asked for."""
    size = e.ints(want) if isinstance(want, int) else e.size_of(want)
    have = e.op("Gather", e.op("Shape", signal), e.ints(axis), axis=0)
    missing = e.op("Sub", size, have)
    pads = e.op("Concat", *([e.ints(0)] * (2 * axis + 1)), missing, axis=0)
    return e.op("Pad", signal, pads, e.constant(0.0, torch.float32))  # type: ignore[no-any-return]
