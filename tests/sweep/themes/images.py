"""Pooling, resizing, sampling and convolutions at free image sizes."""

from __future__ import annotations

import torch
from sweep.cases import Theme, With, real, unit
from torch import nn
from torch.nn import functional as F

IMAGE = {"x": real("b", 3, "h", "w")}

pools = Theme("pooling")
for _name, _function in {
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d with padding": lambda x: F.max_pool2d(x - 3, 3, 2, 1),
    "max_pool2d in ceil mode": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max_pool2d in ceil mode with padding": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_pool2d with dilation": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_pool2d of an image without batch": lambda x: F.max_pool2d(x[0], 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d in ceil mode": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "avg_pool2d in ceil mode with padding": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool2d with padding": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d without counting pads": lambda x: F.avg_pool2d(x, 3, 2, 1, False, False),
    "avg_pool2d in ceil mode, not counting pads": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "avg_pool2d with divisor_override": lambda x: F.avg_pool2d(x, 3, 1, divisor_override=2),
    "avg_pool2d with divisor_override and padding": lambda x: F.avg_pool2d(
        x, 3, 2, 1, divisor_override=5
    ),
    "adaptive_avg_pool2d to 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d to 2": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool2d to 3 by 5": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive_avg_pool2d of one axis": lambda x: F.adaptive_avg_pool2d(x, (None, 1)),
    "adaptive_avg_pool2d to more cells": lambda x: F.adaptive_avg_pool2d(x, 6),
    "adaptive_avg_pool1d to 4": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 4),
    "adaptive_avg_pool3d to 2": lambda x: F.adaptive_avg_pool3d(x[:, None], 2),
    "adaptive_max_pool2d to 1": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive_max_pool2d to 2": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_max_pool2d to 3 by 5": lambda x: F.adaptive_max_pool2d(x, (3, 5)),
    "adaptive_max_pool1d to 4": lambda x: F.adaptive_max_pool1d(x.flatten(2), 4),
    "lp_pool2d": lambda x: F.lp_pool2d(x.abs(), 2, 2),
    "max_pool1d": lambda x: F.max_pool1d(x[:, :, 0], 3, 2, 1),
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], (1, 2, 2)),
    "avg_pool1d in ceil mode": lambda x: F.avg_pool1d(x[:, :, 0], 2, ceil_mode=True),
    "avg_pool3d": lambda x: F.avg_pool3d(x[:, None], 2, 1),
    "avg_pool2d of the whole image": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "pyramid of adaptive_avg_pool2d": lambda x: _pyramid(x),
    "adaptive_avg_pool2d concatenated (spatial pyramid)": lambda x: torch.cat(
        [F.adaptive_avg_pool2d(x, n).flatten(1) for n in (1, 2, 4)], 1
    ),
}.items():
    pools.function(_name, _function, blames=("pool", "divisor_override"), **IMAGE)
pools.function("adaptive_avg_pool2d of a fixed size", lambda x: F.adaptive_avg_pool2d(x, 7),
               x=real("n", 2, 16, 10))  # fmt: skip
pools.function("adaptive_max_pool2d of a fixed size", lambda x: F.adaptive_max_pool2d(x, (4, 3)),
               x=real("n", 2, 16, 10))  # fmt: skip
pools.function(
    "max_unpool2d",
    lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    x=real("n", 2, 8, 8),
    blames=("unpool", "max_pool2d_with_indices"),
)


def _pyramid(x: torch.Tensor) -> torch.Tensor:
    """Pyramid pooling, as in PSPNet."""
    cells = [F.adaptive_avg_pool2d(x, count) for count in (1, 2, 3)]
    return torch.cat([x, *(F.interpolate(c, x.shape[2:], mode="bilinear") for c in cells)], 1)


resizing = Theme("resizing")
for _name, _function in {
    "nearest by a factor": lambda x: F.interpolate(x, scale_factor=2),
    "nearest by a float factor": lambda x: F.interpolate(x, scale_factor=1.5),
    "nearest by half": lambda x: F.interpolate(x, scale_factor=0.5),
    "nearest by an odd factor": lambda x: F.interpolate(x, scale_factor=0.37),
    "nearest by a recomputed factor": lambda x: F.interpolate(
        x, scale_factor=1.3, recompute_scale_factor=True
    ),
    "nearest to a size": lambda x: F.interpolate(x, (5, 7)),
    "nearest-exact by a float factor": lambda x: F.interpolate(
        x, scale_factor=1.7, mode="nearest-exact"
    ),
    "nearest-exact to a size": lambda x: F.interpolate(x, (5, 7), mode="nearest-exact"),
    "bilinear by a factor": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear by a float factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear by two factors": lambda x: F.interpolate(x, scale_factor=(2.0, 0.6), mode="bilinear"),
    "bilinear by a recomputed factor": lambda x: F.interpolate(
        x, scale_factor=0.7, mode="bilinear", recompute_scale_factor=True
    ),
    "bilinear with aligned corners": lambda x: F.interpolate(
        x, scale_factor=1.5, mode="bilinear", align_corners=True
    ),
    "bilinear to a size": lambda x: F.interpolate(x, (12, 5), mode="bilinear"),
    "bilinear to a size, aligned corners": lambda x: F.interpolate(
        x, (12, 5), mode="bilinear", align_corners=True
    ),
    "bilinear to 1 by 1": lambda x: F.interpolate(x, (1, 1), mode="bilinear"),
    "bilinear to 1 by 1, aligned corners": lambda x: F.interpolate(
        x, (1, 1), mode="bilinear", align_corners=True
    ),
    "bilinear to one row": lambda x: F.interpolate(x, (1, 6), mode="bilinear"),
    "bilinear to twice its size": lambda x: F.interpolate(
        x, (x.shape[2] * 2, x.shape[3] * 2), mode="bilinear"
    ),
    "bilinear with antialias": lambda x: F.interpolate(x, (5, 7), mode="bilinear", antialias=True),
    "bicubic by a float factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bicubic"),
    "bicubic to a size": lambda x: F.interpolate(x, (12, 5), mode="bicubic"),
    "bicubic to 1 by 1": lambda x: F.interpolate(x, (1, 1), mode="bicubic"),
    "bicubic with aligned corners": lambda x: F.interpolate(
        x, (12, 5), mode="bicubic", align_corners=True
    ),
    "bicubic with antialias": lambda x: F.interpolate(x, (5, 7), mode="bicubic", antialias=True),
    "area to a size": lambda x: F.interpolate(x, (3, 4), mode="area"),
    "area to its own size": lambda x: F.interpolate(x, x.shape[2:], mode="area"),
    "area by half": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    "area to 1 by 1": lambda x: F.interpolate(x, (1, 1), mode="area"),
    "linear by a float factor": lambda x: F.interpolate(
        x.flatten(2), scale_factor=0.4, mode="linear"
    ),
    "linear to a size": lambda x: F.interpolate(x.flatten(2), 7, mode="linear"),
    "trilinear by a factor": lambda x: F.interpolate(
        x[:, None], scale_factor=(1, 2, 2), mode="trilinear"
    ),
    "nearest of one axis": lambda x: F.interpolate(x.flatten(2), scale_factor=3),
    "resized to a smaller map and added": lambda x: (
        x + F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode="bilinear")
    ),
}.items():
    resizing.function(_name, _function, blames=("upsample", "adaptive"), **IMAGE)
resizing.module("upsample as a layer", lambda: nn.Upsample(scale_factor=2.5, mode="bilinear"),
                **IMAGE)  # fmt: skip

sampling = Theme("sampling")
for _mode in ("bilinear", "nearest", "bicubic"):
    for _pad in ("zeros", "border", "reflection"):
        for _corners in (False, True):
            if (_mode, _pad) not in (("bicubic", "reflection"), ("nearest", "reflection")):
                _text = f"grid_sample {_mode} {_pad}{' aligned' if _corners else ''}"
                sampling.function(
                    _text,
                    lambda x, g, k=(_mode, _pad, _corners): F.grid_sample(
                        x, g * 1.3, k[0], k[1], k[2]
                    ),
                    x=real("b", 2, "h", "w"),
                    g=unit("b", 5, "n", 2),
                    blames=("grid_sampler", "grid_sample"),
                )
sampling.function(
    "affine_grid", lambda x, a: F.grid_sample(x, F.affine_grid(a, x.shape, align_corners=False),
                                              align_corners=False),
    x=real("b", 2, "h", "w"), a=unit("b", 2, 3), blames=("affine_grid", "grid_sample"),
)  # fmt: skip
sampling.function("unfold", lambda x: F.unfold(x, 3, padding=1, stride=2), **IMAGE,
                  blames=("im2col",))  # fmt: skip
sampling.function("unfold with dilation", lambda x: F.unfold(x, 2, dilation=2), **IMAGE,
                  blames=("im2col",))  # fmt: skip
sampling.function(
    "fold of unfold", lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 6), 2, stride=2),
    x=real("b", 3, 8, 6), blames=("col2im",),
)  # fmt: skip
sampling.function(
    "fold with overlap", lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 6), 3, padding=1),
    x=real("b", 3, 8, 6), blames=("col2im",),
)  # fmt: skip
sampling.function(
    "fold at a free size",
    lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    **IMAGE, blames=("col2im",),
)  # fmt: skip


def _roi(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    theta = m.theta.expand(x.shape[0], -1, -1)
    return F.grid_sample(x, F.affine_grid(theta, (x.shape[0], 3, 4, 5), align_corners=False),
                         align_corners=False)  # fmt: skip


sampling.module("spatial transformer", lambda: With(_roi, theta=torch.randn(1, 2, 3) * 0.5),
                **IMAGE, blames=("grid",))  # fmt: skip

convs = Theme("convolutions")
for _name, _build in {
    "conv2d": lambda: nn.Conv2d(3, 4, 3),
    "conv2d, same padding": lambda: nn.Conv2d(3, 4, 4, padding="same"),
    "conv2d, grouped and dilated": lambda: nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3),
    "conv2d, circular padding": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "conv2d, reflect padding": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "conv2d, uneven stride and padding": lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0)),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(3, 4, 3),
    "conv_transpose2d, stride 2": lambda: nn.ConvTranspose2d(3, 4, 4, 2, 1),
    "conv_transpose2d, output padding": lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, 1),
    "conv_transpose2d, grouped": lambda: nn.ConvTranspose2d(3, 6, 3, 2, groups=3),
    "conv_transpose2d, dilated": lambda: nn.ConvTranspose2d(3, 4, 3, dilation=2),
}.items():
    convs.module(_name, _build, **IMAGE)
convs.module(
    "conv_transpose2d, output_size",
    lambda: With(
        lambda m, x: m.up(m.down(x), output_size=x.shape[2:]),
        down=nn.Conv2d(3, 4, 3, 2, 1),
        up=nn.ConvTranspose2d(4, 3, 3, 2, 1),
    ),
    blames=("conv_transpose2d",),
    **IMAGE,
)
convs.module("conv1d", lambda: nn.Conv1d(5, 4, 3, padding=1), x=real("b", 5, "t"))
convs.module("conv1d, causal", lambda: With(lambda m, x: m.c(F.pad(x, (4, 0))),
             c=nn.Conv1d(5, 4, 3, dilation=2)), x=real("b", 5, "t"))  # fmt: skip
convs.module("conv_transpose1d", lambda: nn.ConvTranspose1d(5, 4, 8, 4, 2), x=real("b", 5, "t"))
convs.module("conv3d", lambda: nn.Conv3d(1, 2, 2), x=real("b", 1, 4, "h", "w"))
convs.module("conv_transpose3d", lambda: nn.ConvTranspose3d(1, 2, 2, 2), x=real("b", 1, 3, "h", 4))
convs.module("conv2d without batch", lambda: nn.Conv2d(3, 4, 3), x=real(3, "h", "w"))
convs.function("conv2d with a computed weight", lambda x, w: F.conv2d(x, w.softmax(0), padding=1),
               x=real("b", 3, "h", "w"), w=real(4, 3, 3, 3))  # fmt: skip
convs.function(
    "conv2d by the batch as groups",
    lambda x, w: F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.flatten(0, 1)[:, None],
                          groups=x.shape[0] * 3).view(x.shape[0], 3, -1),
    x=real("b", 3, 8, 8), w=real("b", 3, 3, 3), blames=("conv2d",),
)  # fmt: skip

THEMES = (pools, resizing, sampling, convs)
