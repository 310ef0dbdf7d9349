"""Options of data that is made instead of read. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graphwright.ir.options import Options, Rule

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class WeightAdjust(Options):
    """The teacher of every batch of images: the model, moved a little way up its own loss."""

    rho: NotNegative = 0.015
    """Length of the way in all parameters together, in units of the weights; 0 is the model."""

    steps: Count = 12
    """Steps of gradient ascent, each `rho / steps` long."""


class SynthesisOptions(Options):
    """Options of `source: bn_synthesis`: images out of a classifier and its batch norms."""

    rules = (
        Rule("std", "len(mean) == len(std)", "mean and std need one value each per channel"),
        Rule("std", "all(s > 0 for s in std)", "std has to be more than 0"),
    )

    iterations: Count = 1000
    """Steps of every batch of images; the published runs take 2000 to 4000."""

    batch: Annotated[int, Field(ge=2)] = 100
    """Images that are made together at most, and whose statistics are matched."""

    lr: Positive = 0.1
    """Step of Adam on the images; falls to 0 on a cosine."""

    bn_weight: NotNegative = 0.05
    """Factor of the distance from the running statistics, beside the cross entropy."""

    first_bn: NotNegative = 10.0
    """Factor of the first batch norm's distance among the others."""

    variance_weight: NotNegative = 1.0
    """Factor of the distance of variances beside that of means; 2 to 11 with `weight_adjust`."""

    curriculum: Literal["step", "linear", "cosine"] = "cosine"
    """Course of the least area of the random crop, from the whole image to `min_area`."""

    milestone: Share = 1.0
    """Share of the iterations in which the curriculum runs; with 0 every crop may be small."""

    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Least area of a crop at the end of the curriculum, as a share of the image."""

    flip: bool = True
    """Whether images are mirrored at random; not for images that mean another thing mirrored."""

    jitter: Annotated[int, Field(ge=0)] | None = None
    """Largest circular shift in pixels; a seventh of images of 224 pixels and more, a sixteenth of
    smaller ones, when absent."""

    mean: tuple[float, ...] = ()
    """Mean per channel that the model's images are normalized with; with it, pixels stay within 0
    and 1. When absent, the input's declared `range` is kept, if there is one."""

    std: tuple[float, ...] = ()
    """Standard deviation per channel that the model's images are normalized with."""

    weight_adjust: WeightAdjust | None = None
    """Gives every batch a teacher of its own, so that batches differ more; off when absent. The
    paper has no curriculum with it: set `milestone: 0`."""

    step: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` lets every image lengthen or shorten its step, by what the model says of the whole
    image."""

    loss_weight: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` moves the shares of cross entropy and statistics in the same way."""

    labels: Literal["hard", "soft"] = "hard"
    """Labels: the class that an image was made for, or the probabilities that the model gives."""


class ShiftOptions(Options):
    """Options of `source: domain_shift`: images of `data` by night, or as a sensor sees them."""

    rules = (
        Rule("white", "black < white", "black {black:g} is not below white {white:g}"),
        Rule("dim", "0 < dim[0] <= dim[1]", "dim is a least and a largest factor above 0"),
        Rule("as_shot", "all(c > 0 for c in as_shot)", "as_shot has to be more than 0"),
    )

    raw: bool = False
    """Turns RGB images into a sensor's first, with a camera of random colours and gains for each:
    an input of 4 channels is a packed Bayer pattern (images of twice its height and width), of 1
    channel the pattern in its place, of 3 the colours without a pattern."""

    night: bool = True
    """Dims images and lights them anew."""

    noise: bool = True
    """Adds a sensor's noise."""

    iso: Annotated[int, Field(ge=50, le=409600)] = 1600
    """Sensitivity whose noise is added, as 1600 or 3200."""

    black: float = 0.0
    """Value of black in the model's images."""

    white: float = 1.0
    """Largest value in the model's images."""

    dim: tuple[float, float] = (0.55, 0.9)
    """Least and largest factor of the brightness."""

    lights: Annotated[int, Field(ge=0)] = 5
    """Lights with a colour and a place of their own; the first one is everywhere, and weak."""

    saturated: Annotated[int, Field(ge=0)] = 5
    """Small lights that are brighter than what the sensor can hold."""

    as_shot: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Colour of the light that images were taken in, which is taken out; red, green, blue."""

    night_mean: tuple[NotNegative, NotNegative, NotNegative] = (1.0, 0.75, 0.45)
    """Mean colour of a night light; lamps are warm. Set it to your camera's."""

    night_std: tuple[NotNegative, NotNegative, NotNegative] = (0.15, 0.1, 0.15)
    """Standard deviation of that colour, per channel."""
