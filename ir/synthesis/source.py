"""Data that is made instead of read: what a section of a spec with a `source` means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches, example_sizes, from_table, load_data
from graphwright.ir.data.checks import LABEL_NAMES
from graphwright.ir.data.sources import Column
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.synthesis.images import check_channels, synthesize
from graphwright.ir.synthesis.options import SynthesisOptions
from graphwright.ir.synthesis.statistics import subject_of
from graphwright.ir.tune.losses import main_output, wide

DEFAULT_SAMPLES = 256
DEFAULT_BATCH_SIZE = 8
AT_ONCE = 64
"""Images that the model labels at a time."""


def check_source(section: Mapping[str, Any], program: Program) -> None:
    """What a section's `source` lacks, said before anything is made.

    Args:
        section: as for `make_data`.
        program: the model.

    Raises:
        ModelError: the model lacks what the source takes.
        ArgumentError: too few samples are asked for.
    """
    subject = subject_of(program)
    check_channels(subject, synthesis_options(section))
    if (section.get("samples") or DEFAULT_SAMPLES) < 2:
        raise ArgumentError("bn_synthesis matches statistics over images: ask for 2 or more")


def make_data(
    section: Mapping[str, Any], program: Program, context: Context, root: str | Path = "."
) -> Batches:
    """The batches of a section with a `source`, the same in every run with the same seed.

    Args:
        section: `source`, and optionally `data`, `samples`, `batch_size`, `synthesis`.
        program: the model, before the first pass.
        context: seed, device, progress; what is made is kept in its work folder.
        root: folder that relative paths start from.

    Raises:
        ModelError, ArgumentError: as `check_source` says; or `data` cannot be read.
    """
    check_source(section, program)
    context = replace(context, scope=("data", str(section["source"])))
    made = _synthesized(section, program, context, root)
    size = section.get("batch_size") or DEFAULT_BATCH_SIZE
    return as_data(made, program, str(section["source"]), size)


def synthesis_options(section: Mapping[str, Any]) -> SynthesisOptions:
    """The options of `bn_synthesis`."""
    given = section.get("synthesis") or {}
    return SynthesisOptions.model_validate(given, strict=False)


def as_data(tensors: Mapping[str, Tensor], program: Program, source: str, size: int) -> Batches:
    """Tensors with samples on their first axis as batches that can be read in any order.

    Args:
        tensors: by input name, and `labels`.
        program: takes the inputs.
        source: name of where they come from.
        size: samples per batch; the program's own where it takes one number only.
    """
    fixed = program.signature.inputs[0].shape[0]
    table = {name: _column(tensor) for name, tensor in tensors.items()}
    return from_table(
        source, table, program.signature, None, fixed if isinstance(fixed, int) else size
    )


def _column(tensor: Tensor) -> Column:
    return Column(tuple(tensor.shape), lambda start, stop: tensor[start:stop])


def _synthesized(
    section: Mapping[str, Any], program: Program, context: Context, root: str | Path
) -> dict[str, Tensor]:
    """Images by the input's name, and labels."""
    options = synthesis_options(section)
    samples = section.get("samples") or DEFAULT_SAMPLES
    start = None
    if section.get("data"):
        start = real_images(section, program, context.seed, root)
        start = (start[0][:samples], start[1][:samples])
    images, labels = synthesize(program, samples, options, context, start)
    if options.labels == "soft":
        labels = logits_of(program, images).softmax(-1)
    return {program.signature.inputs[0].name: images, LABEL_NAMES[0]: labels}


def real_images(
    section: Mapping[str, Any], program: Program, seed: int, root: str | Path
) -> tuple[Tensor, Tensor]:
    """All images that the section's `data` names, and their classes.

    Classes are the data's own labels; those that the model sees where it has none.
    """
    given = {"data": section["data"], "batch_size": AT_ONCE}
    sizes = example_sizes(program.signature, program.examples)
    batches = load_data(given, program.signature, seed, root=root, sizes=sizes)
    name = program.signature.inputs[0].name
    read = list(batches.labelled())
    images = torch.cat([inputs[name] for inputs, _ in read])
    if not batches.has_labels:
        return images, logits_of(program, images).argmax(-1)
    labels = torch.cat([labels for _, labels in read if labels is not None])
    if labels.is_floating_point() or labels.dim() != 1:
        raise ArgumentError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} are no classes",
            where=str(section["data"]),
            fix="Give one whole number per image, or leave `labels` out.",
        )
    return images, labels.long()


def logits_of(program: Program, images: Tensor) -> Tensor:
    """What a classifier says of images, (images, classes), in batches that it takes."""
    main, fixed = main_output(program.signature), program.signature.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else AT_ONCE
    found = []
    with torch.no_grad():
        for begin in range(0, len(images), size):
            rows = torch.arange(begin, begin + size) if isinstance(fixed, int) else None
            part = images[begin : begin + size] if rows is None else images[rows % len(images)]
            found.append(wide(program.run_flat((part,))[main]))
    return torch.cat(found)[: len(images)]
