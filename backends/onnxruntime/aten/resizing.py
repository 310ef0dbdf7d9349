"""Resizing of images and sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnxruntime.aten import translates
from graphwright.backends.onnxruntime.emitter import Emitter, sizes_of

aten = torch.ops.aten


def _resize(e: Emitter, node: fx.Node, x: Any, factors: Any, **attributes: Any) -> Any:
    if factors is not None and all(isinstance(f, float | int) for f in factors):
        scales = e.constant([1.0, 1.0, *map(float, factors)], torch.float32)
        return e.op("Resize", e.values[x], None, scales, **attributes)
    return e.op("Resize", e.values[x], None, None, e.shape(sizes_of(node)), **attributes)


@translates(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(e: Emitter, node: fx.Node, x: Any, output_size: Any, factors: Any) -> Any:
    return _resize(
        e, node, x, factors, mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip


@translates(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec)
def upsample_linear(
    e: Emitter, node: fx.Node, x: Any, output_size: Any, align_corners: bool, factors: Any
) -> Any:
    mode = "cubic" if node.target is aten.upsample_bicubic2d.vec else "linear"
    corners = "align_corners" if align_corners else "pytorch_half_pixel"
    return _resize(
        e, node, x, factors, mode=mode, coordinate_transformation_mode=corners,
        cubic_coeff_a=-0.75 if mode == "cubic" else None,
    )  # fmt: skip
