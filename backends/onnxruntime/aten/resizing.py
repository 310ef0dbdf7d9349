"""Resizing of images and sequences, and sampling at given places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


def _factors(node: fx.Node, x: fx.Node, factors: Any) -> list[float] | None:
    """The growth of every axis, where that is one number at every size."""
    if factors is not None:
        fixed = all(isinstance(f, float | int) for f in factors)
        return [float(f) for f in factors] if fixed else None
    found = []
    for have, want in zip(sizes_of(x)[2:], sizes_of(node)[2:], strict=True):
        ratio = sympy.sympify(want) / sympy.sympify(have)
        if not ratio.is_number:
            return None
        found.append(float(ratio))
    return found


def _resize(e: Emitter, node: fx.Node, x: Any, factors: Any, **attributes: Any) -> Any:
    known = _factors(node, x, factors)
    if known is not None:
        scales = e.constant([1.0, 1.0, *known], torch.float32)
        return e.op("Resize", e.values[x], None, scales, **attributes)
    return e.op("Resize", e.values[x], None, None, e.shape(sizes_of(node)), **attributes)


# ---- nearest


@translates(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(e: Emitter, node: fx.Node, x: Any, output_size: Any, factors: Any) -> Any:
    known = _factors(node, x, factors)
    if known is not None and all(factor.is_integer() for factor in known):
        return _resize(
            e, node, x, factors, mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
    return _picked(e, node, x, factors, 0.0)


@translates(
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
)
def upsample_exact(e: Emitter, node: fx.Node, x: Any, output_size: Any, factors: Any) -> Any:
    return _picked(e, node, x, factors, 0.5)


def _picked(e: Emitter, node: fx.Node, x: fx.Node, factors: Any, shift: float) -> ir.Value:
    """Every place from floor((place + shift) * scale), in float32 as torch computes it.

    Resize divides by a factor where torch multiplies by its inverse, and a place that lies on the
    border between two of the input's then comes from the other one.
    """
    value = e.values[x]
    single = torch.float32
    for axis, (have, want) in enumerate(zip(sizes_of(x)[2:], sizes_of(node)[2:], strict=True)):
        size, count = (e.ints(s) if isinstance(s, int) else e.size_of(s) for s in (have, want))
        if factors is None:
            wide = e.cast(size, torch.int64, single)
            scale = e.op("Div", wide, e.cast(count, torch.int64, single))
        elif isinstance(factors[axis], float | int):
            scale = e.constant([1 / float(factors[axis])], single)
        else:
            one = e.constant(1.0, torch.float64)
            scale = e.cast(
                e.op("Div", one, e.tensor(factors[axis], torch.float64)), torch.float64, single
            )
        zero, step = e.constant(0, torch.int64), e.constant(1, torch.int64)
        places = e.cast(e.op("Range", zero, e.op("Squeeze", count), step), torch.int64, single)
        if shift:
            places = e.op("Add", places, e.constant(shift, single))
        source = e.op("Floor", e.op("Mul", places, scale))
        index = e.op("Min", e.cast(source, single, torch.int64), e.op("Sub", size, e.ints(1)))
        value = e.op("Gather", value, index, axis=axis + 2)
    return value  # type: ignore[no-any-return]


# ---- linear and cubic


@translates(
    aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec,
)
def upsample_linear(
    e: Emitter, node: fx.Node, x: Any, output_size: Any, align_corners: bool, factors: Any
) -> Any:
    mode = "cubic" if node.target is aten.upsample_bicubic2d.vec else "linear"
    corners = "align_corners" if align_corners else "half_pixel"
    return _resize(
        e, node, x, factors, mode=mode, coordinate_transformation_mode=corners,
        cubic_coeff_a=-0.75 if mode == "cubic" else None,
    )  # fmt: skip


@translates(aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec)
def upsample_antialiased(
    e: Emitter, node: fx.Node, x: Any, output_size: Any, align_corners: bool, factors: Any
) -> Any:
    if align_corners:
        raise Untranslatable(node, "antialiasing with aligned corners")
    cubic = node.target is aten._upsample_bicubic2d_aa.vec
    return _resize(
        e, node, x, factors, mode="cubic" if cubic else "linear", antialias=1,
        coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.5 if cubic else None,
        exclude_outside=1,
    )  # fmt: skip


# ---- sampling


@translates(aten.grid_sampler.default)
def grid_sampler(
    e: Emitter, node: fx.Node, x: Any, grid: Any, mode: int, padding: int, align_corners: bool
) -> Any:
    if x.meta["val"].dim() != 4 or e.opset < 20:
        raise Untranslatable(node, "sampling in a volume, or before opset 20")
    return e.op(
        "GridSample", e.values[x], e.values[grid], align_corners=int(align_corners),
        mode=("linear", "nearest", "cubic")[mode],
        padding_mode=("zeros", "border", "reflection")[padding],
    )  # fmt: skip


@translates(aten.col2im.default)
def col2im(
    e: Emitter, node: fx.Node, x: Any, size: Sequence[Any], kernel: list[int], dilation: list[int],
    padding: list[int], stride: list[int],
) -> Any:  # fmt: skip
    if x.meta["val"].dim() != 3:
        raise Untranslatable(node, "without a batch axis")
    want = sizes_of(node)[-2:]
    return e.op(
        "Col2Im", e.values[x], e.shape(want), e.ints(*kernel), dilations=dilation,
        pads=[*padding, *padding], strides=stride,
    )  # fmt: skip
