"""Fourier transforms as products with the matrix of the transform; in any length.

The matrices are computed in the model from the length, which may be free; where it is fixed, ONNX
Runtime computes them once, when it opens the model. Long transforms whose length is a power of two
are DFT nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from graphwright.backends.onnxruntime.aten.complex_numbers import Pair, pair_of
from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, expression, sizes_of

aten = torch.ops.aten
LONG = 256
"""Length from which a DFT node (n log n, powers of two only) is worth its twiddle factors."""


def _value(e: Emitter, size: Any) -> ir.Value:
    return e.ints(size) if isinstance(size, int) else e.size_of(size)


def _counted(e: Emitter, count: ir.Value) -> ir.Value:
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    return e.op("Range", zero, e.op("Squeeze", count), one)  # type: ignore[no-any-return]


def basis(e: Emitter, rows: ir.Value, columns: ir.Value, length: ir.Value) -> Pair:
    """(rows, columns) float64: cos and sin of 2 pi j k / length."""
    j = e.op("Unsqueeze", _counted(e, rows), e.ints(1))
    turns = e.op("Mod", e.op("Mul", j, _counted(e, columns)), length)
    wide = e.cast(turns, torch.int64, torch.float64)
    share = e.op("Div", wide, e.cast(length, torch.int64, torch.float64))
    angle = e.op("Mul", share, e.constant(2 * math.pi, torch.float64))
    return Pair(e.op("Cos", angle), e.op("Sin", angle))


def _norm(e: Emitter, length: ir.Value, norm: str | None, inverse: bool) -> ir.Value | None:
    """The float64 factor of a transform; None where it is 1."""
    if norm == "ortho":
        root = e.op("Sqrt", e.cast(length, torch.int64, torch.float64))
        return e.op("Reciprocal", root)  # type: ignore[no-any-return]
    if (norm == "forward") == inverse:
        return None
    return e.op("Reciprocal", e.cast(length, torch.int64, torch.float64))  # type: ignore[no-any-return]


def _resized(e: Emitter, value: ir.Value, axis: int, have: Any, want: Any) -> ir.Value:
    """An axis cut, or filled up with zeros."""
    if have == want:
        return value
    size, missing = _value(e, want), e.op("Sub", _value(e, want), _value(e, have))
    cut = e.op("Slice", value, e.ints(0), size, e.ints(axis))
    more = e.op("Max", missing, e.ints(0))
    shape = e.op("ScatterElements", e.op("Shape", cut), e.ints(axis), more, axis=0)
    zeros = e.op("Expand", e.op("CastLike", e.constant(0.0, torch.float32), value), shape)
    return e.op("Concat", cut, zeros, axis=axis)  # type: ignore[no-any-return]


class Transform:
    """One transform along one axis of a tensor of known rank and dtype."""

    def __init__(self, e: Emitter, rank: int, axis: int, dtype: torch.dtype) -> None:
        self.e = e
        self.dtype = dtype
        self.axis = axis % rank
        self.order = [i for i in range(rank) if i != self.axis] + [self.axis]

    def times(self, value: ir.Value, matrix: ir.Value) -> ir.Value:
        """The product of the axis with a matrix (rows, columns)."""
        e = self.e
        last = self.axis == len(self.order) - 1
        moved = value if last else e.op("Transpose", value, perm=self.order)
        product = e.op("MatMul", moved, e.cast(matrix, torch.float64, self.dtype))
        if last:
            return product  # type: ignore[no-any-return]
        back = [self.order.index(i) for i in range(len(self.order))]
        return e.op("Transpose", product, perm=back)  # type: ignore[no-any-return]

    def forward(
        self, parts: Sequence[ir.Value], length: Any, columns: Any, norm: str | None, inverse: bool
    ) -> Pair:
        """From one or two parts to the first `columns` frequencies."""
        e, count = self.e, _value(self.e, length)
        long = isinstance(length, int) and length >= LONG and length & (length - 1) == 0
        if long and e.opset >= 20:
            return self._by_node(parts, length, columns, norm, inverse)
        cos, sin = basis(e, count, _value(e, columns), count)
        factor = _norm(e, count, norm, inverse)
        if factor is not None:
            cos, sin = e.op("Mul", cos, factor), e.op("Mul", sin, factor)
        sin = sin if inverse else e.op("Neg", sin)
        a = parts[0]
        real, imaginary = self.times(a, cos), self.times(a, sin)
        if len(parts) == 2:
            b = parts[1]
            real = e.op("Sub", real, self.times(b, sin))
            imaginary = e.op("Add", imaginary, self.times(b, cos))
        return Pair(real, imaginary)

    def to_real(self, parts: Pair, length: Any, norm: str | None) -> ir.Value:
        """From the first half of the frequencies to real values."""
        e, count = self.e, _value(self.e, length)
        half = e.op("Add", e.op("Div", count, e.ints(2)), e.ints(1))
        cos, sin = basis(e, half, count, count)
        weight = mirrored(e, half, count)
        factor = _norm(e, count, norm, inverse=True)
        weight = weight if factor is None else e.op("Mul", weight, factor)
        first = self.times(parts.real, e.op("Mul", cos, weight))
        second = self.times(parts.imaginary, e.op("Mul", sin, weight))
        return e.op("Sub", first, second)  # type: ignore[no-any-return]

    def _by_node(
        self, parts: Sequence[ir.Value], length: int, columns: Any, norm: str | None, inverse: bool
    ) -> Pair:
        e = self.e
        wide = [e.op("Unsqueeze", part, e.ints(-1)) for part in parts]
        signal = wide[0] if len(wide) == 1 else e.op("Concat", *wide, axis=-1)
        axis = e.constant(self.axis, torch.int64)
        found = e.op("DFT", signal, None, axis, inverse=int(inverse), onesided=0)
        scale = {"ortho": length**-0.5, "forward": 1.0 if inverse else 1 / length}.get(
            norm or "backward", 1 / length if inverse else 1.0
        )
        # The node itself divides an inverse transform by the length.
        scale = scale * length if inverse else scale
        halves = []
        for i in range(2):
            part = e.op("Gather", found, e.constant(i, torch.int64), axis=-1)
            part = e.op("Slice", part, e.ints(0), _value(e, columns), e.ints(self.axis))
            halves.append(part if scale == 1 else e.op("Mul", part, e.constant(scale, self.dtype)))
        return Pair(*halves)


def mirrored(e: Emitter, half: ir.Value, length: ir.Value) -> ir.Value:
    """(half, 1) float64: how often each frequency of a half spectrum stands in the whole one."""
    k = _counted(e, half)
    once = e.op("Equal", e.op("Mod", e.op("Mul", k, e.ints(2)), length), e.ints(0))
    weight = e.op("Where", once, e.constant(1.0, torch.float64), e.constant(2.0, torch.float64))
    return e.op("Unsqueeze", weight, e.ints(1))  # type: ignore[no-any-return]


# ---- torch.fft


def _length(x: fx.Node, n: Any, dim: int) -> Any:
    if n is None:
        return sizes_of(x)[dim]
    return expression(n.meta["val"] if isinstance(n, fx.Node) else n)


def _parts(e: Emitter, x: fx.Node) -> list[ir.Value]:
    return list(pair_of(e, x)) if x.meta["val"].dtype.is_complex else [e.values[x]]


def _real_dtype(x: fx.Node) -> torch.dtype:
    dtype = x.meta["val"].dtype
    if dtype not in (torch.float32, torch.complex64, torch.float64, torch.complex128):
        raise Untranslatable(x, f"a Fourier transform of {dtype}")
    return dtype.to_real()  # type: ignore[no-any-return]


def _complex_transform(inverse: bool) -> Any:
    def translate(
        e: Emitter, node: fx.Node, x: Any, n: Any = None, dim: int = -1, norm: Any = None
    ) -> Any:
        length = _length(x, n, dim)
        axis = dim % x.meta["val"].dim()
        parts = [_resized(e, p, axis, sizes_of(x)[dim], length) for p in _parts(e, x)]
        transform = Transform(e, x.meta["val"].dim(), dim, _real_dtype(x))
        return transform.forward(parts, length, length, norm, inverse)

    return translate


translates(aten.fft_fft.default)(_complex_transform(inverse=False))
translates(aten.fft_ifft.default)(_complex_transform(inverse=True))


@translates(aten.fft_rfft.default)
def rfft(e: Emitter, node: fx.Node, x: Any, n: Any = None, dim: int = -1, norm: Any = None) -> Any:
    length, rank = _length(x, n, dim), x.meta["val"].dim()
    value = _resized(e, e.values[x], dim % rank, sizes_of(x)[dim], length)
    transform = Transform(e, rank, dim, _real_dtype(x))
    return transform.forward([value], length, sizes_of(node)[dim], norm, inverse=False)


@translates(aten.fft_irfft.default)
def irfft(e: Emitter, node: fx.Node, x: Any, n: Any = None, dim: int = -1, norm: Any = None) -> Any:
    rank = x.meta["val"].dim()
    return _irfft(e, node, Pair(*_with_imaginary(e, x)), x, dim % rank, norm)


def _with_imaginary(e: Emitter, x: fx.Node) -> list[ir.Value]:
    parts = _parts(e, x)
    if len(parts) == 1:
        parts.append(e.op("Sub", parts[0], parts[0]))
    return parts


def _irfft(
    e: Emitter, node: fx.Node, parts: Pair, x: fx.Node, axis: int, norm: str | None
) -> ir.Value:
    length = sizes_of(node)[axis]
    half = FloorDiv(length, 2) + 1 if not isinstance(length, int) else length // 2 + 1
    cut = Pair(*(_resized(e, p, axis, sizes_of(x)[axis], half) for p in parts))
    transform = Transform(e, x.meta["val"].dim(), axis, _real_dtype(x))
    return transform.to_real(cut, length, norm)


def _axes(node: fx.Node, x: fx.Node, s: Any, dim: Any) -> list[int]:
    rank = x.meta["val"].dim()
    if dim is None:
        dim = range(-len(s), 0) if s is not None else range(rank)
    return [d % rank for d in dim]


def _several(inverse: bool, name: str) -> Any:
    default = [-2, -1] if name.endswith("2") else None

    def translate(
        e: Emitter, node: fx.Node, x: Any, s: Any = None, dim: Any = default, norm: Any = None
    ) -> Any:
        if s is not None:
            raise Untranslatable(node, "a transform to other sizes")
        axes = _axes(node, x, s, dim)
        rank, dtype, sizes = x.meta["val"].dim(), _real_dtype(x), sizes_of(x)
        parts = _parts(e, x)
        to_real, from_real = name.startswith("irfft"), name.startswith("rfft")
        if from_real:
            last = axes.pop()
            columns = sizes_of(node)[last]
            transform = Transform(e, rank, last, dtype)
            parts = list(transform.forward(parts, sizes[last], columns, norm, inverse=False))
        end = axes.pop() if to_real else None
        for axis in axes:
            transform = Transform(e, rank, axis, dtype)
            parts = list(transform.forward(parts, sizes[axis], sizes[axis], norm, inverse))
        if end is None:
            return Pair(*parts)
        return _irfft(e, node, Pair(*parts), x, end, norm)

    return translate


for _name in ("fft2", "fftn", "rfft2", "rfftn"):
    translates(getattr(aten, f"fft_{_name}").default)(_several(False, _name))
for _name in ("ifft2", "ifftn", "irfft2", "irfftn"):
    translates(getattr(aten, f"fft_{_name}").default)(_several(True, _name))
