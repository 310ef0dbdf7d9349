"""The one image that a restorer takes and gives, and the sizes of the images of the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graphwright.ir.data.batches import Batches, as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec
from graphwright.ir.tune.losses import main_output


def image_of(program: Program, by: str, free: str) -> TensorSpec:
    """The one input, an image (batch, channels, height, width).

    Args:
        program: a network of images.
        by: id of the pass, for messages.
        free: which axes have to be free: some of "batch", "height" and "width", in words.

    Raises:
        ModelError: there is another input, it is no image, or one of these axes has a fixed size.
    """
    inputs = program.signature.inputs
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or not _is_float(inputs[0].dtype):
        given = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in inputs)
        raise ModelError(f"{by} trains networks of one image (batch, channels, height, width); "
                         f"this one takes {given}")  # fmt: skip
    spec = inputs[0]
    names = ("batch", "", "height", "width")
    fixed = [name for name, size in zip(names, spec.shape, strict=True)
             if name in free.split() and isinstance(size, int)]  # fmt: skip
    if fixed:
        raise ModelError(
            f"{by} runs {spec.name!r} at other sizes than {list(spec.shape)}: the "
            f"{' and '.join(fixed)} {'is' if len(fixed) == 1 else 'are'} fixed",
            fix="Trace it with batch, height and width free (`dynamic`, or `model.inputs`).",
        )
    return spec


def refuse_other_size(program: Program, by: str) -> None:
    """Raises ModelError where the main output has not the shape of the one input."""
    spec = program.signature.inputs[0]
    output = program.signature.outputs[main_output(program.signature)]
    if tuple(output.shape) != tuple(spec.shape):
        raise ModelError(f"{by} compares the output with the image, and their shapes are "
                         f"{list(output.shape)} and {list(spec.shape)}")  # fmt: skip


def whole_cells(data: Iterable[Any], program: Program, cell: int, why: str, by: str) -> Batches:
    """The data, whose images are a whole number of cells high and wide, as the first batch shows.

    Raises:
        ArgumentError: they are not.
    """
    batches = as_batches(data, program.signature)
    name = program.signature.inputs[0].name
    for first in batches:
        refuse_parts(first[name].shape, cell, why, by)
        break
    return batches


def refuse_parts(shape: Iterable[int], cell: int, why: str, by: str) -> None:
    """Raises ArgumentError where height or width is no multiple of a cell."""
    height, width = list(shape)[-2:]
    if height % cell or width % cell or min(height, width) < 2 * cell:
        raise ArgumentError(
            f"{by}: images of {height} x {width} are no two or more whole cells of {cell} ({why})",
            fix="Cut the training images to a multiple of it.",
        )


def _is_float(dtype: str) -> bool:
    return bool(getattr(torch, dtype).is_floating_point)
