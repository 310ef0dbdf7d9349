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
from graphwright.ir.synthesis.filters import (
    Made,
    check_left,
    keep_accepted,
    keep_agreeing,
    keep_predicting,
)
from graphwright.ir.synthesis.images import check_channels, synthesize
from graphwright.ir.synthesis.logits import logits_of
from graphwright.ir.synthesis.options import ShiftOptions, SynthesisOptions
from graphwright.ir.synthesis.shift import check_shift, shifted
from graphwright.ir.synthesis.statistics import subject_of
from graphwright.ir.tune.losses import main_output

DEFAULT_SAMPLES = 256
DEFAULT_BATCH_SIZE = 8
DEFAULT_THRESHOLD = 0.7
DEFAULT_KEEP = 0.5
AT_ONCE = 64
"""Images that are read at a time."""


def check_source(section: Mapping[str, Any], program: Program) -> None:
    """What a section's `source` lacks, said before anything is made.

    Args:
        section: as for `make_data`.
        program: the model.

    Raises:
        ModelError: the model lacks what the source or the filter takes.
        ArgumentError: too few samples are asked for.
    """
    if section["source"] == "domain_shift":
        check_shift(program, shift_options(section))
        if section.get("filter"):
            main_output(program.signature)
        return
    subject = subject_of(program)
    check_channels(subject, synthesis_options(section))
    if (section.get("samples") or DEFAULT_SAMPLES) < 2:
        raise ArgumentError("bn_synthesis matches statistics over images: ask for 2 or more")


def make_data(
    section: Mapping[str, Any], program: Program, context: Context, root: str | Path = "."
) -> Batches:
    """The batches of a section with a `source`, the same in every run with the same seed.

    Args:
        section: `source`, and optionally `data`, `samples`, `batch_size`, `synthesis`, `shift`,
            `filter` with `threshold` and `keep`.
        program: the model, before the first pass.
        context: seed, device, progress; what is made is kept in its work folder. It is warned of
            images that the filter leaves out.
        root: folder that relative paths start from.

    Raises:
        ModelError, ArgumentError: as `check_source` says; `data` cannot be read, or a filter leaves
            no two images.
    """
    check_source(section, program)
    context = replace(context, scope=("data", str(section["source"])))
    if section["source"] == "domain_shift":
        images, before, labels = shifted(section, program, shift_options(section), context, root)
        made = Made(images, labels, before)
    else:
        made = _synthesized(section, program, context, root)
    made = _filtered(section, made, program, context)
    tensors = {program.signature.inputs[0].name: made.images}
    if section["source"] == "bn_synthesis" and synthesis_options(section).labels == "soft":
        tensors[LABEL_NAMES[0]] = logits_of(program, made.images).softmax(-1)
    elif made.labels is not None:
        tensors[LABEL_NAMES[0]] = made.labels
    size = section.get("batch_size") or DEFAULT_BATCH_SIZE
    return as_data(tensors, program, str(section["source"]), size)


def _filtered(section: Mapping[str, Any], made: Made, program: Program, context: Context) -> Made:
    name, count = section.get("filter"), len(made.images)
    if name is None:
        return made
    if name == "agreement":
        kept = keep_agreeing(made, program, section.get("threshold", DEFAULT_THRESHOLD))
    elif name == "metropolis_hastings":
        kept = keep_accepted(made, program, context)
    else:
        kept = keep_predicting(made, program, section.get("keep", DEFAULT_KEEP))
    check_left(kept, count, name)
    if len(kept.images) < count:
        context.warn(f"filter: {name} keeps {len(kept.images)} of {count} images")
    return kept


def synthesis_options(section: Mapping[str, Any]) -> SynthesisOptions:
    """The options of `bn_synthesis`."""
    given = section.get("synthesis") or {}
    return SynthesisOptions.model_validate(given, strict=False)


def shift_options(section: Mapping[str, Any]) -> ShiftOptions:
    """The options of `domain_shift`."""
    return ShiftOptions.model_validate(section.get("shift") or {}, strict=False)


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
) -> Made:
    samples = section.get("samples") or DEFAULT_SAMPLES
    options = synthesis_options(section)
    if not section.get("data"):
        return Made(*synthesize(program, samples, options, context))
    real, classes = real_images(section, program, context.seed, root)
    start = (real[:samples], classes[:samples])
    images, labels = synthesize(program, samples, options, context, start)
    rows = torch.arange(samples) % len(start[0])
    return Made(images, labels, start[0][rows], real)


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
