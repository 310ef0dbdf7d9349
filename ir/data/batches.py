"""Calibration and evaluation data: checked batches of named tensors that can be read again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.data.checks import (
    LABEL_NAMES,
    RawBatch,
    check_batch,
    check_names,
    named_batch,
    without_padding,
)
from graphwright.ir.data.defaults import started, with_defaults
from graphwright.ir.data.pieces import pieces_of, wanted_samples
from graphwright.ir.data.sources import Column, Table, open_source
from graphwright.ir.data.synthetic import (
    draw_size,
    example_sizes,
    synthetic_inputs,
)
from graphwright.ir.data.text_samples import text_samples
from graphwright.ir.data.texts import TextSource
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature

__all__ = [
    "Batches",
    "Rows",
    "as_batches",
    "batch_size",
    "check_batch",
    "example_sizes",
    "from_table",
    "load_data",
    "synthetic_inputs",
]

TEXT_OPTIONS = ("window", "stride", "chat_template")
DEFAULT_BATCH_SIZE = 8
DEFAULT_SYNTHETIC_SAMPLES = 32


@dataclass(frozen=True)
class Rows:
    """Samples that can be read in any order.

    Attributes:
        count: how many there are.
        size: samples per batch, as asked for.
        take: gives a batch of the samples with these indices.
    """

    count: int
    size: int
    take: Callable[[Sequence[int]], RawBatch]


@dataclass(frozen=True)
class Batches:
    """Batches of inputs, in signature order, as often as they are asked for.

    Iterating gives `{input name: tensor}`, fit for `program(**batch)`; `labelled()` gives the
    labels beside it. Every batch is checked against the signature as it is read.

    Attributes:
        source: where the data comes from, as the user wrote it.
        has_labels: whether there are labels (a `labels` or `targets` column).
        notes: what a reader should know, such as columns that were left out.
        rows: the samples in any order; None where the source has an order of its own.
        initial: inputs that no source has, as the state a model starts from.
        program: signature of a program some of whose inputs follow from the source's, which
            `signature` has alone.
    """

    source: str
    signature: Signature
    read: Callable[[], Iterable[RawBatch]]
    label_name: str | None = None
    notes: tuple[str, ...] = ()
    rows: Rows | None = None
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    program: Signature | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for inputs, _ in self.labelled():
            yield inputs

    def labelled(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """(inputs, labels) of every batch; labels is None where there are none.

        Raises:
            ArgumentError: a batch does not fit the signature; names the batch and the input.
        """
        for index, raw in enumerate(self.read()):
            yield self._checked(raw, f"batch {index}")

    def at(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """(inputs, labels) of the samples with these indices, where the source has `rows`."""
        if self.rows is None:
            raise ArgumentError("gives its batches in one order only", where=self.source)
        return self._checked(self.rows.take(indices), f"samples {indices[0]}, ...")

    def _checked(self, raw: RawBatch, what: str) -> tuple[dict[str, Tensor], Tensor | None]:
        labels = raw.get(self.label_name) if self.label_name else None
        batch = check_batch(raw, self.signature, f"{self.source}, {what}")
        batch, labels = without_padding(batch, labels, self.signature)
        whole = {**batch, **self.initial}
        if self.program is not None:
            filled = with_defaults(self.program, whole)
            whole = {spec.name: filled[spec.name] for spec in self.program.inputs}
        return whole, labels

    def __len__(self) -> int:
        """Number of batches."""
        return self._counts[0]

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return self._counts[1]

    @property
    def has_labels(self) -> bool:
        return self.label_name is not None

    @cached_property
    def _counts(self) -> tuple[int, int]:
        sizes = [batch_size(inputs, self.signature) for inputs in self]
        return len(sizes), sum(sizes)


def load_data(
    section: Mapping[str, Any],
    signature: Signature,
    seed: int,
    *,
    root: str | Path = ".",
    sizes: Mapping[str, int] | None = None,
    tokenizer: str | Path | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Batches:
    """Opens the data that a `calibration` or `evaluate` section names.

    `section["data"]` is one of: an `.npz` or `.safetensors` file or a folder of `.npy` files with
    one array per input, samples first; `package.module:name`, a function without arguments (or a
    list) that gives batches as mappings by input name or tuples in input order; a `.txt` file
    with one text per line, tokenized by the model's own tokenizer; `synthetic`, seeded random
    values within the signature's ranges. The first `samples` samples are used, in file order.

    Args:
        section: `data`, and optionally `samples`, `batch_size`, `tokenizer`, `max_length`,
            `window`, `stride`, `chat_template`; with the `metric` perplexity windows have labels,
            and with agreement a conversation ends where the model's answer begins.
        signature: what the batches must fit.
        seed: of synthetic data; other sources do not draw.
        root: folder that relative paths start from.
        sizes: example size of each dynamic dimension, the largest that synthetic data uses.
        tokenizer: folder with the tokenizer's files, where the section names none.
        initial: the model's own state by input name, which every sample starts from.

    Raises:
        ArgumentError: the data cannot be opened or does not fit; says which input and why.
    """
    if initial:
        rest = tuple(spec for spec in signature.inputs if spec.name not in initial)
        own = replace(signature, inputs=rest)
        batches = load_data(section, own, seed, root=root, sizes=sizes, tokenizer=tokenizer)
        return replace(batches, initial=initial)
    whole, signature = signature, started(signature)
    batches = _opened(section, signature, whole, seed, Path(root), sizes or {}, tokenizer)
    return replace(batches, program=whole) if whole.defaults else batches


def _opened(
    section: Mapping[str, Any], signature: Signature, whole: Signature, seed: int, root: Path,
    sizes: Mapping[str, int], tokenizer: str | Path | None,
) -> Batches:  # fmt: skip
    """Batches of what the source has of the inputs."""
    data = str(section["data"])
    samples, size = section.get("samples"), section.get("batch_size") or DEFAULT_BATCH_SIZE
    fixed = signature.inputs[0].shape[:1] if signature.inputs else ()
    if fixed and isinstance(fixed[0], int):
        size = fixed[0]
    if data == "synthetic":
        return _synthetic(signature, samples or DEFAULT_SYNTHETIC_SAMPLES, size, seed, sizes)
    chat = bool(section.get("chat_template"))
    folder = section.get("tokenizer") or tokenizer
    asks = section.get("metric") == "agreement"
    source = open_source(data, root, tokenizer=folder, chat=chat, asks=asks)
    given = [name for name in TEXT_OPTIONS if section.get(name)]
    if given and not isinstance(source, TextSource):
        raise ArgumentError(f"{given[0]} is for text, a .txt file", where=data)
    if isinstance(source, dict):
        signature = started(whole, source)
        return from_table(data, source, signature, samples, size)
    if isinstance(source, TextSource):
        return _from_text(data, source, signature, samples, size, section)
    return _from_stream(data, source, whole, samples)


def as_batches(data: Iterable[Any], signature: Signature) -> Batches:
    """`data` itself when it is `Batches`, else its items as batches, in its own order.

    An item is a mapping by input name, or a tuple in input order; one value more is the labels.

    Raises:
        ArgumentError: it can be read only once, or its first batch does not fit.
    """
    if isinstance(data, Batches):
        return data
    if iter(data) is data:
        raise ArgumentError(
            "the data is an iterator, which can be read only once", fix="Give a list."
        )
    return _from_stream("the data", lambda: data, signature, None)


def batch_size(inputs: RawBatch, signature: Signature) -> int:
    """Samples in a batch: the first axis of the first input that has one."""
    for spec in signature.inputs:
        if spec.shape:
            return int(inputs[spec.name].shape[0])
    return 1


# --- kinds of source ---------------------------------------------------------------------------


def from_table(
    data: str, table: Table, signature: Signature, samples: int | None, size: int
) -> Batches:
    """Batches of columns with samples on their first axis: see `load_data`."""
    check_names(list(table), signature, data)
    label = next((n for n in LABEL_NAMES if n in table and not _is_input(n, signature)), None)
    batched = {n: c for n, c in table.items() if n == label or _is_batched(n, c, signature)}
    whole = {n: c for n, c in table.items() if _is_input(n, signature) and n not in batched}
    rows = {name: column.shape[0] for name, column in batched.items() if column.shape}
    if len(set(rows.values())) > 1:
        raise ArgumentError(f"the arrays have different numbers of samples: {rows}", where=data)
    available = next(iter(rows.values()), 1)
    count = wanted_samples(data, samples, available)
    pieces = pieces_of(data, signature, count, size)

    def read() -> Iterator[RawBatch]:
        for start, stop in pieces:
            piece = {n: c.read(start, stop) for n, c in batched.items()}
            yield piece | {n: c.read(0, c.shape[0] if c.shape else 1) for n, c in whole.items()}

    def take(indices: Sequence[int]) -> RawBatch:
        piece = {n: torch.cat([c.read(i, i + 1) for i in indices]) for n, c in batched.items()}
        return piece | {n: c.read(0, c.shape[0] if c.shape else 1) for n, c in whole.items()}

    extra = sorted(set(table) - set(batched) - set(whole))
    notes = (f"{data}: {extra} are not inputs of the model: left out",) if extra else ()
    samples_by_index = Rows(count, size, take) if batched else None
    batches = Batches(data, signature, read, label, notes, samples_by_index)
    _ = len(batches)  # reads everything once: bad data is refused now, not an hour into a run
    return batches


def _from_text(
    data: str,
    source: TextSource,
    signature: Signature,
    samples: int | None,
    size: int,
    section: Mapping[str, Any],
) -> Batches:
    count, take = text_samples(data, source, signature, samples, section)
    pieces = pieces_of(data, signature, count, size)

    def read() -> Iterator[RawBatch]:
        for start, stop in pieces:
            yield take(range(start, stop))

    has_labels = section.get("window") and section.get("metric") == "perplexity"
    label = LABEL_NAMES[0] if has_labels else None
    batches = Batches(data, signature, read, label, rows=Rows(count, size, take))
    _ = len(batches)
    return batches


def _from_stream(
    data: str, items: Callable[[], Iterable[Any]], signature: Signature, samples: int | None
) -> Batches:
    def read() -> Iterator[RawBatch]:
        seen = 0
        for index, item in enumerate(items()):
            if samples is not None and seen >= samples:
                return
            batch = named_batch(item, signature, f"{data}, batch {index}")
            first = next(iter(batch.values()), None)
            seen += int(first.shape[0]) if first is not None and first.dim() else 1
            yield batch
        if seen == 0 or (samples is not None and seen < samples):
            raise ArgumentError(
                f"gives {seen} samples, {samples or 'some'} were asked for", where=data
            )

    whole = signature
    first_item = next(iter(items()), None)
    signature = started(whole, first_item) if isinstance(first_item, Mapping) else started(whole)
    head = next(iter(read()))
    label = next((n for n in LABEL_NAMES if n in head and not _is_input(n, signature)), None)
    check_batch(head, signature, f"{data}, batch 0")
    return Batches(data, signature, read, label, program=whole if whole.defaults else None)


def _synthetic(
    signature: Signature, samples: int, size: int, seed: int, sizes: Mapping[str, int]
) -> Batches:
    first = signature.inputs[0].shape[:1] if signature.inputs else ()

    def read() -> Iterator[RawBatch]:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, samples, size):
            free = [n for n in signature.dims if n not in signature.derived]
            drawn = {n: draw_size(n, signature, sizes, generator) for n in free}
            if first and isinstance(first[0], str):
                low = signature.dims.get(first[0], DimRange()).min
                drawn[first[0]] = max(low, min(size, samples - start))
            yield synthetic_inputs(signature, signature.completed(drawn), generator)

    return Batches("synthetic", signature, read)


def _is_input(name: str, signature: Signature) -> bool:
    return any(spec.name == name for spec in signature.inputs)


def _is_batched(name: str, column: Column, signature: Signature) -> bool:
    """Whether an input's first axis counts samples: it is the first input's first axis too."""
    first = next((s.shape[0] for s in signature.inputs if s.shape), None)
    spec = next((s for s in signature.inputs if s.name == name), None)
    return spec is not None and bool(spec.shape) and spec.shape[0] == first and bool(column.shape)
