"""GGUF files that lie: none crashes the reader, makes it allocate wildly, or is read as another."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graphwright.ir.errors import ModelError
from graphwright.ir.files.gguf.blocks import form_of, values_of
from graphwright.ir.files.gguf.reader import read_gguf_file

STRING, ARRAY, U8, U32, U64, F32 = 8, 9, 0, 4, 10, 6


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return text(name) + numbers


def file_of(
    entries: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: bytes = b"",
    counts: tuple[int, int] | None = None, version: int = 3,
) -> bytes:  # fmt: skip
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def sane() -> bytes:
    names = (entry("general.architecture", STRING, text("llama")),
             entry("a.number", U32, struct.pack("<I", 7)),
             entry("a.list", ARRAY, struct.pack("<IQ", STRING, 3) + b"".join(map(text, "abc"))),
             entry("b.list", ARRAY, struct.pack("<IQ4I", U32, 4, 1, 2, 3, 4)))  # fmt: skip
    table = (tensor("x", (64, 3), 3, 0), tensor("y", (5,), 0, 128), tensor("z", (32, 2), 8, 160))
    return file_of(names, table, bytes(range(228)))


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no version": (lambda: b"GGUF", "ends inside"),
    "version 1": (lambda: file_of(version=1), "has version 1"),
    "big endian": (lambda: b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (lambda: file_of(counts=(1 << 60, 0)), "claims 1152921504606846976 tensors"),
    "more tensors than bytes": (lambda: file_of(counts=(900, 0)), "claims 900 tensors"),
    "many entries": (lambda: file_of(counts=(0, 1 << 63)), "claims 9223372036854775808 entries"),
    "a long name": (lambda: file_of((struct.pack("<QQ", 1 << 62, 1),)), "of 4611686018427387904"),
    "a long text": (
        lambda: file_of((entry("a", STRING, struct.pack("<Q", 1 << 50)),)), "ends inside"),
    "no UTF-8": (lambda: file_of((entry("a", STRING, text(b"\xff\xfe")),)), "not UTF-8"),
    "an unknown value": (lambda: file_of((entry("a", 77, bytes(8)),)), "unknown type 77"),
    "a long list": (
        lambda: file_of((entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 61)),)),
        "claims 2305843009213693952 strings"),
    "a long array": (
        lambda: file_of((entry("a", ARRAY, struct.pack("<IQ", U64, 1 << 62)),)), "ends inside"),
    "arrays of arrays": (
        lambda: file_of((entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "array of arrays"),
    "an entry twice": (lambda: file_of((entry("a", U8, b"1"),) * 2), "two entries"),
    "a tensor twice": (
        lambda: file_of((), (tensor("x", (1,), 0, 0), tensor("x", (1,), 0, 32)), bytes(64)),
        "two tensors"),
    "no dimension": (lambda: file_of((), (tensor("x", (), 0, 0),)), "0 dimensions"),
    "many dimensions": (lambda: file_of((), (tensor("x", (1,) * 9, 0, 0),)), "9 dimensions"),
    "a size of 0": (lambda: file_of((), (tensor("x", (0,), 0, 0),)), "sizes"),
    "sizes that overflow": (
        lambda: file_of((), (tensor("x", (1 << 33, 1 << 33), 0, 0),)), "gives 'x' the sizes"),
    "half a block": (lambda: file_of((), (tensor("x", (33,), 2, 0),), bytes(64)), "blocks hold 32"),
    "an unknown type": (lambda: file_of((), (tensor("x", (32,), 4, 0),), bytes(64)), "number 4"),
    "an offset beyond": (lambda: file_of((), (tensor("x", (1,), 0, 1 << 40),)), "cut short"),
    "an offset between": (lambda: file_of((), (tensor("x", (1,), 0, 4),), bytes(64)), "alignment"),
    "overlapping": (
        lambda: file_of((), (tensor("x", (9,), 0, 0), tensor("y", (1,), 0, 32)), bytes(64)),
        "'x' and 'y' overlap"),
    "an alignment of 0": (
        lambda: file_of((entry("general.alignment", U32, bytes(4)),)), "alignment of 0"),
    "an alignment of text": (
        lambda: file_of((entry("general.alignment", STRING, text("32")),)), "alignment of '32'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_named(name: str, tmp_path: Path) -> None:
    make, message = LIES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    with pytest.raises(ModelError, match=message) as caught:
        read_gguf_file(path)
    assert caught.value.exit_code == 3


def test_the_sane_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sane())
    file = read_gguf_file(path)
    assert file.architecture == "llama"
    assert file.entries["a.list"] == ["a", "b", "c"]
    assert [stored.shape for stored in file.tensors.values()] == [(3, 64), (5,), (2, 32)]


def test_mutations_are_refused_or_read_within_the_file(tmp_path: Path) -> None:
    """Thousands of files: flipped bits, lying numbers, cuts, repeats. What is read lies inside."""
    whole, draw = sane(), random.Random(0)
    path, start = tmp_path / "model.gguf", time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(2500):
        data = _mutated(whole, draw)
        path.write_bytes(data)
        try:
            file = read_gguf_file(path)
            for stored in file.tensors.values():
                assert stored.data.numel() <= len(data)
                if values_of(stored) is None and len(stored.shape) == 2:
                    form_of(stored)
        except ModelError:
            refused += 1
    assert 600 < refused < 2500
    assert time.monotonic() - start < 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def _mutated(whole: bytes, draw: random.Random) -> bytes:
    data, at = bytearray(whole), draw.randrange(len(whole))
    kind = draw.randrange(5)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        number = draw.choice([0, 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, len(whole)])
        data[at : at + 8] = struct.pack("<Q", number)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = data[at : at + draw.randrange(1, 40)]
    else:
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)
