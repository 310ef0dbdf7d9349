"""Writes a GGUF file, version 3, little endian. Source: the GGUF specification."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from graphwright.ir.files.gguf.reader import MAGIC, Stored
from graphwright.ir.files.gguf.types import NUMBERS

ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_OF_NUMPY = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6,
             "bool": 7, "uint64": 10, "int64": 11, "float64": 12}  # fmt: skip
_FORMS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q"}


def write_gguf_file(path: Path, entries: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Writes metadata and tensors.

    Args:
        path: of the file.
        entries: truth values, whole numbers, floats (single precision), strings, lists of strings,
            NumPy arrays of numbers.
        tensors: their bytes as `Stored` has them.
    """
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", MAGIC, 3, len(tensors), len(entries)))
        for name, value in entries.items():
            file.write(_text(name) + _value(value))
        offset = 0
        for name, stored in tensors.items():
            sizes = stored.shape[::-1]
            file.write(_text(name) + struct.pack(
                f"<I{len(sizes)}QIQ", len(sizes), *sizes, NUMBERS[stored.type.name], offset
            ))  # fmt: skip
            offset += -(-stored.data.numel() // ALIGNMENT) * ALIGNMENT
        for stored in tensors.values():
            _align(file)
            file.write(_bytes(stored.data))
        _align(file)


def _bytes(data: Tensor) -> memoryview:
    return memoryview(data.contiguous().numpy().data)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """The type of a value and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = _OF_NUMPY[value.dtype.name]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
    if isinstance(value, Iterable):
        parts = [_text(part) for part in value]
        return struct.pack("<IIQ", _ARRAY, _STRING, len(parts)) + b"".join(parts)
    kind = _kind(value)
    return struct.pack("<I", kind) + struct.pack(_FORMS[kind], value)


def _kind(value: bool | int | float) -> int:
    """The smallest usual type of a number: 32 bits, unsigned where it can be."""
    if isinstance(value, bool):
        return 7
    if isinstance(value, float):
        return 6
    if value < 0:
        return 5 if value >= -(1 << 31) else 11
    return 4 if value < 1 << 32 else 10
