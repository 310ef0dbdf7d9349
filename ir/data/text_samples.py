"""Samples of a text for a model: its lines, or windows over all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from graphwright.ir.data.pieces import wanted_samples
from graphwright.ir.data.texts import TextSource, Windows
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature

Take = Callable[[Sequence[int]], dict[str, Tensor]]


def text_samples(
    data: str,
    source: TextSource,
    signature: Signature,
    samples: int | None,
    section: Mapping[str, Any],
) -> tuple[int, Take]:
    """The number of samples, and what gives a batch of those with some indices.

    Args:
        data: as the user wrote it.
        source: the text.
        signature: whose second dimension counts tokens.
        samples: how many are wanted; all when absent.
        section: `max_length`, `window`, `stride`.

    Raises:
        ArgumentError: the model takes no sequences, or not of that length; options that do not go
            together.
    """
    names = [spec.name for spec in signature.inputs]
    fixed, bounds = _length(data, signature)
    if section.get("window") or section.get("stride"):
        windows = _windows(data, source, section, fixed, bounds)
        count = wanted_samples(data, samples, len(windows.starts))
        return count, lambda indices: windows.take(indices, names)
    limits = [n for n in (fixed, bounds.max, section.get("max_length")) if n is not None]

    def take(indices: Sequence[int]) -> dict[str, Tensor]:
        texts = [source.texts[index] for index in indices]
        return source.encode(texts, names, min(limits, default=None), fixed, bounds.min)

    return wanted_samples(data, samples, len(source.texts)), take


def _length(data: str, signature: Signature) -> tuple[int | None, DimRange]:
    """The length that the model takes if it takes one only, and the range it takes else."""
    lengths = [spec.shape[1] for spec in signature.inputs if len(spec.shape) == 2]
    if not lengths:
        raise ArgumentError("text needs a model with inputs of shape (batch, length)", where=data)
    length = lengths[0]
    fixed = length if isinstance(length, int) else None
    return fixed, signature.dims.get(str(length), DimRange())


def _windows(
    data: str, source: TextSource, section: Mapping[str, Any], fixed: int | None, bounds: DimRange
) -> Windows:
    length, stride = section.get("window"), section.get("stride")
    if length is None:
        raise ArgumentError("stride: give the `window` that it moves", where=data)
    if section.get("max_length"):
        raise ArgumentError("max_length: the `window` is the length", where=data)
    stride = stride or length
    if stride > length:
        raise ArgumentError(f"stride {stride} leaves tokens out of windows of {length}", where=data)
    most = fixed if fixed is not None else bounds.max
    if (most is not None and length > most) or (fixed is not None and length != fixed):
        takes = f"{fixed}" if fixed is not None else f"at most {most}"
        raise ArgumentError(f"window {length}: the model takes {takes} tokens", where=data)
    return source.windows(length, stride, data)
