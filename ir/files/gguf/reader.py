"""Reads the header of a GGUF file and maps its tensors; nothing in the file is believed.

    "GGUF", version, number of tensors, number of entries
    entries: name, type, value              names and values of strings are length and bytes
    tensors: name, sizes, type, offset      the fastest size first
    padding to the alignment, then the data that the offsets count from

Every count and length is held against what is left of the file before anything is made of it, and
the tensors against its end and each other, so that time and memory follow the size of the file.
Source: the GGUF specification, versions 2 and 3 (little endian).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_special
from graphwright.ir.files.gguf.types import TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MOST_NAME = 1 << 16
MOST_ENTRIES = 1 << 16
MOST_TENSORS = 1 << 20
MOST_STRINGS = 1 << 22
"""Strings in the arrays of a file: vocabularies are some hundred thousand."""
MOST_AXES = 4
MOST_NUMBERS = 1 << 48
"""Numbers in one tensor: sizes are multiplied, and the product must not be one of many digits."""
ALIGNMENTS = tuple(1 << power for power in range(3, 21))

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
"""Types of values that are numbers; 7 is a truth value."""
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        type: of its numbers.
        shape: as torch says it, the fastest size last.
        data: (rows, bytes of a row) uint8, a view of the file.
    """

    type: TensorType
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class GgufFile:
    """A file, read.

    Attributes:
        path: of it.
        version: of the format.
        entries: metadata by name: numbers, truth values, strings; arrays of strings are lists, of
            numbers NumPy arrays.
        tensors: by name, in the order of the file.
        digest: of all in front of the data, in hex.
    """

    path: Path
    version: int
    entries: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    digest: str

    @property
    def architecture(self) -> str:
        """Name of the architecture; empty where there is none."""
        found = self.entries.get("general.architecture", "")
        return found if isinstance(found, str) else ""


def read_gguf_file(path: Path) -> GgufFile:
    """The metadata and the tensors of a file, which are mapped and not read.

    Raises:
        ModelError: no GGUF file, a version or byte order that is not read, cut short, or one whose
            header contradicts itself or the file's size.
    """
    refuse_special(path)
    try:
        size = path.stat().st_size
        # A private map: a view of it may be written to, and the file stays as it is.
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise ModelError("cannot be read", where=str(path), details=(str(error),)) from None
    reader = _Reader(path, data)
    version = reader.opening()
    tensors, entries = reader.count("tensors", MOST_TENSORS), reader.count("entries", MOST_ENTRIES)
    found = reader.entries(entries)
    table = reader.table(tensors)
    mapped = _mapped(reader, found, table)
    digest = hashlib.sha256(reader.view[: reader.at]).hexdigest()
    return GgufFile(path, version, found, mapped, digest)


class _Reader:
    """A place in the bytes of a file."""

    def __init__(self, path: Path, data: Tensor) -> None:
        self.path = path
        self.data = data
        self.view = memoryview(data.numpy().data)
        self.size = len(self.view)
        self.at = 0
        self.strings = 0

    def wrong(self, what: str, fix: str = "") -> ModelError:
        return ModelError(f"the GGUF file {what}", where=str(self.path), fix=fix)

    def take(self, count: int, what: str) -> memoryview:
        """The next bytes; refuses more than there are."""
        if count > self.size - self.at:
            raise self.wrong(f"ends inside {what}, or its header is damaged",
                             "Copy or download it again.")  # fmt: skip
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def opening(self) -> int:
        """The version."""
        if bytes(self.take(4, "its first bytes")) != MAGIC:
            raise self.wrong("does not begin as one")
        version: int = self.number("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in VERSIONS else f"has version {version}"
            raise self.wrong(
                f"{what}, which is not read", "Convert the model again with a current llama.cpp."
            )
        return version

    def count(self, what: str, most: int) -> int:
        found: int = self.number("<Q", "its counts")
        # The shortest entry or tensor is a length, a type and a value.
        if found > most or found * 13 > self.size:
            raise self.wrong(f"claims {found} {what}")
        return found

    def text(self, what: str, most: int | None = None) -> str:
        length: int = self.number("<Q", what)
        if most is not None and length > most:
            raise self.wrong(f"has {what} of {length} bytes")
        raw = bytes(self.take(length, what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"has {what} that is not UTF-8") from None

    def entries(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text("the name of an entry", MOST_NAME)
            if name in found:
                raise self.wrong(f"has two entries {name!r}")
            found[name] = self.value(self.number("<I", f"the type of {name!r}"), name)
        return found

    def value(self, kind: int, name: str) -> Any:
        what = f"the entry {name!r}"
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(name)
        if kind not in _NUMBERS:
            raise self.wrong(f"has a value of unknown type {kind} in {what}")
        dtype = np.dtype(_NUMBERS[kind])
        found = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        return bool(found) if kind == _BOOL else found

    def array(self, name: str) -> Any:
        """A list of strings, or an array of numbers; arrays of arrays are nobody's."""
        what = f"the entry {name!r}"
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind == _STRING:
            self.strings += count
            if count * 8 > self.size - self.at or self.strings > MOST_STRINGS:
                raise self.wrong(f"claims {count} strings in {what}")
            return [self.text(what) for _ in range(count)]
        if kind not in _NUMBERS:
            nested = "an array of arrays" if kind == _ARRAY else f"values of unknown type {kind}"
            raise self.wrong(f"has {nested} in {what}")
        dtype = np.dtype(_NUMBERS[kind])
        raw = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        return raw.astype(bool) if kind == _BOOL else raw

    def table(self, count: int) -> dict[str, tuple[TensorType, tuple[int, ...], int]]:
        """Type, shape and offset of every tensor."""
        found = {}
        for _ in range(count):
            name = self.text("the name of a tensor", MOST_NAME)
            if name in found:
                raise self.wrong(f"has two tensors {name!r}")
            axes = self.number("<I", f"the sizes of {name!r}")
            if not 1 <= axes <= MOST_AXES:
                raise self.wrong(f"gives {name!r} {axes} dimensions")
            sizes = [self.number("<Q", f"the sizes of {name!r}") for _ in range(axes)]
            number, offset = self.number("<I", name), self.number("<Q", name)
            found[name] = (self.type(name, number, sizes), tuple(reversed(sizes)), offset)
        return found

    def type(self, name: str, number: int, sizes: list[int]) -> TensorType:
        kind = TYPES.get(number)
        if kind is None:
            raise self.wrong(
                f"stores {name!r} in a type that is not known, number {number}",
                "Convert the model to a common type, such as Q4_K or Q8_0.",
            )
        total = 1
        for size in sizes:
            total *= size
            if size < 1 or total > MOST_NUMBERS:
                raise self.wrong(f"gives {name!r} the sizes {sizes}")
        if sizes[0] % kind.block:
            raise self.wrong(f"stores rows of {sizes[0]} numbers of {name!r} in {kind.name}, "
                             f"whose blocks hold {kind.block}")  # fmt: skip
        return kind


def _mapped(
    reader: _Reader,
    entries: Mapping[str, Any],
    table: Mapping[str, tuple[TensorType, tuple[int, ...], int]],
) -> dict[str, Stored]:
    """Views of the data, none of which leave the file or overlap."""
    alignment = entries.get("general.alignment", 32)
    if alignment not in ALIGNMENTS:
        raise reader.wrong(f"has an alignment of {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    found: dict[str, Stored] = {}
    taken: list[tuple[int, int, str]] = []
    for name, (kind, shape, offset) in table.items():
        row = shape[-1] // kind.block * kind.size
        rows = 1
        for size in shape[:-1]:
            rows *= size
        end = offset + rows * row
        if offset % alignment:
            raise reader.wrong(f"puts {name!r} at {offset}, against its alignment of {alignment}")
        if end > reader.size - start:
            raise reader.wrong(f"is cut short: {name!r} ends at {start + end}, the file at "
                               f"{reader.size}", "Copy or download it again.")  # fmt: skip
        taken.append((offset, end, name))
        data = reader.data[start + offset : start + end].view(rows, row)
        found[name] = Stored(kind, shape, data)
    taken.sort()
    for (_, end, name), (begin, _, other) in pairwise(taken):
        if begin < end:
            raise reader.wrong(f"lets {name!r} and {other!r} overlap")
    return found
