"""Images of another domain out of those of a file: by night, and as a sensor sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.context import Context
from graphwright.ir.data.batches import example_sizes, load_data
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.synthesis.night import noise_of_iso, noisy, relit
from graphwright.ir.synthesis.options import ShiftOptions
from graphwright.ir.synthesis.raw import drawn_camera, mosaic, to_raw
from graphwright.ir.synthesis.statistics import image_input

AT_ONCE = 64


def check_shift(program: Program, options: ShiftOptions) -> None:
    """What a model lacks for images of another domain.

    Raises:
        ModelError: its input is no image of 3 or 4 channels (1, 3 or 4 with `raw`).
    """
    image, _ = image_input(program, "domain_shift", least=1)
    channels, allowed = image.shape[1], (1, 3, 4) if options.raw else (3, 4)
    if channels not in allowed:
        raise ModelError(
            f"domain_shift makes images of {' or '.join(map(str, allowed))} channels, and input "
            f"{image.name!r} takes {channels}"
        )
    if channels == 1 and options.night:
        raise ModelError(
            f"domain_shift lights colours, and input {image.name!r} is one plane of a mosaic",
            fix="Set night: false.",
        )


def shifted(
    section: Mapping[str, Any],
    program: Program,
    options: ShiftOptions,
    context: Context,
    root: str | Path,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images of the other domain, the same images before, and their labels if there are any.

    Args:
        section: `data`, and optionally `samples`; with `raw`, RGB images in the model's input.
        program: takes the images.
        options: how.
        context: seed; every image has random numbers of its own.
        root: folder that relative paths start from.

    Raises:
        ArgumentError: the data does not fit, or holds values outside of `black` and `white`.
    """
    channels = program.signature.inputs[0].shape[1]
    signature = _of_rgb(program.signature) if options.raw else program.signature
    sizes = example_sizes(program.signature, program.examples)
    given = {"data": section["data"], "samples": section.get("samples"), "batch_size": AT_ONCE}
    batches = load_data(given, signature, context.seed, root=root, sizes=sizes)
    name = signature.inputs[0].name
    read = list(batches.labelled())
    images = torch.cat([inputs[name] for inputs, _ in read])
    labels = [found for _, found in read if found is not None]
    plain = (images - options.black) / (options.white - options.black)
    if float(plain.min()) < -1e-3 or float(plain.max()) > 1 + 1e-3:
        raise ArgumentError(
            f"holds values from {float(images.min()):g} to {float(images.max()):g}, and `black` and"
            f" `white` are {options.black:g} and {options.white:g}",
            where=str(section["data"]),
            fix="Set them to the least and largest value that an image can have.",
        )
    before, after = [], []
    for index, image in enumerate(plain.clamp(0, 1).split(1)):
        if options.raw:
            image = to_raw(image, drawn_camera(context.generator("camera", index)))
            image = image if channels == 3 else mosaic(image, int(channels))
        before.append(image)
        after.append(_one(image, options, context, index))
    restore = (torch.cat(part) * (options.white - options.black) + options.black
               for part in (after, before))  # fmt: skip
    made, originals = restore
    return made, originals, torch.cat(labels) if labels else None


def _one(image: Tensor, options: ShiftOptions, context: Context, index: int) -> Tensor:
    if options.night:
        balance = torch.tensor(options.as_shot, dtype=image.dtype)
        places = [0, 1, 1, 2] if image.shape[1] == 4 else [0, 1, 2]
        image = image / balance[places].view(-1, 1, 1)
        image = relit(image, options, context.generator("lights", index))
    if options.noise:
        image = noisy(image, *noise_of_iso(options.iso), context.generator("noise", index))
    return image


def _of_rgb(signature: Signature) -> Signature:
    """The interface of the RGB images that a model's RAW input is made of."""
    (spec,) = signature.inputs
    batch, channels, *sizes = spec.shape
    if channels == 4:
        sizes = [2 * size if isinstance(size, int) else size for size in sizes]
    return replace(signature, inputs=(replace(spec, shape=(batch, 3, *sizes), range=None),))
