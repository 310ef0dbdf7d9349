"""A coded tensor as bytes: two digests, the circuit's integers, the words of the coder.

    8 bytes   of blake2b over all that follows
    8 bytes   of blake2b over dtype, shape and values of the tensor
    header    version, bits of a code, types K, symbols S - 1 (a byte each), bytes of the tables
              (u16), words (u32)
    symbols   a bit for every value of a code: whether it occurs
    weights   K of u32
    tables    K * S bytes, the logarithms of the frequencies, deflated
    states    one u32 per lane
    words     of u16

All numbers are little-endian. Dtype and shape stand beside the stream, in the file's own table;
how many lanes there are follows from them.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphwright.ir.files.entropy.circuit import MOST_LEVEL, WEIGHT, Array, Circuit, fitted
from graphwright.ir.files.entropy.coder import BrokenStreamError, decode, encode, lanes_for

FACT = "store.entropy"
"""The fact of a program whose codes are written like this: `latent` and `smallest`."""

VERSION = 1
DIGEST = 8
HEADER = struct.Struct("<BBBBHI")
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a field that bytes are tried as: codes are packed low bits first along the last axis."""

LONGEST = 1 << 16
"""Bytes of a row: its codes are decoded one after the other."""

MOST_GAIN = 64
"""A tensor is at most this many times as large as its stream, which bounds what a file can ask."""


WORTH = 0.005
"""Share of the bits that a wider code, or twice as many row types, have to save."""


@dataclass(frozen=True)
class Coded:
    """A tensor's stream, and what there was to gain.

    Attributes:
        stream: the bytes.
        width: bits of a code.
        codes: how many codes the tensor holds.
        entropy: bits per code of one static table, tables not counted (order 0).
        types: K.
    """

    stream: bytes
    width: int
    codes: int
    entropy: float
    types: int

    @property
    def bits(self) -> float:
        """Bits per code that are stored, all counted."""
        return 8 * len(self.stream) / self.codes


def refusal(values: Array, smallest: int) -> str:
    """Why a tensor is stored as it is; empty where it may be coded.

    Args:
        values: the tensor. smallest: bytes of the smallest one that is worth tables.
    """
    if values.dtype not in (np.int8, np.uint8):
        return f"{values.dtype} is no dtype of codes of up to 8 bits"
    if values.ndim < 2:
        return "it has no rows"
    if values.nbytes < smallest:
        return f"{values.nbytes} bytes, which are too few for tables"
    if values.nbytes > LONGEST * len(values):
        return f"its rows have more than {LONGEST} bytes"
    return ""


def coded(values: Array, most_types: int) -> Coded | None:
    """The smallest stream of codes in (rows, ...), int8 or uint8; None where none is smaller.

    The width of a code and the number of row types, a power of two up to `most_types`, are those
    that need the fewest bits, tables counted; a larger one has to save `WORTH`.
    """
    rows = values.shape[0]
    width = _width(values)
    symbols = _fields(values, width).reshape(rows, -1)
    alphabet, places = np.unique(symbols, return_inverse=True)
    places = places.reshape(symbols.shape)
    counts = _counts(places, len(alphabet))
    circuit = _best(counts, most_types)
    lanes = lanes_for(*places.shape)
    words, states = encode(places, circuit, lanes)
    tables = zlib.compress(circuit.levels.tobytes(), 9)
    header = HEADER.pack(VERSION, width, circuit.types, len(alphabet) - 1, len(tables), len(words))
    parts = (
        header, _occurring(alphabet, width), circuit.weights.astype("<u4").tobytes(),
        tables, states.astype("<u4").tobytes(),
        words.astype("<u2").tobytes(),
    )  # fmt: skip
    body = _content(values) + b"".join(parts)
    stream = _digest(body) + body
    if not len(stream) < values.nbytes <= MOST_GAIN * len(stream):
        return None
    return Coded(stream, width, symbols.size, _order0(symbols) / symbols.size, circuit.types)


def decoded(stream: bytes, dtype: np.dtype[np.generic], shape: Sequence[int]) -> Array:
    """The very tensor that `coded` was given.

    Raises:
        BrokenStreamError: the stream is damaged, or no stream of such a tensor.
    """
    if len(stream) < 2 * DIGEST + HEADER.size or _digest(stream[DIGEST:]) != stream[:DIGEST]:
        raise BrokenStreamError("its checksum is another one")
    size = math.prod(shape) * dtype.itemsize
    fits = dtype in (np.int8, np.uint8) and len(shape) > 1 and size > 0
    if not fits or size > min(MOST_GAIN * len(stream), LONGEST * shape[0]):
        raise BrokenStreamError(f"{dtype} of shape {tuple(shape)} is never coded in so few bytes")
    version, width, types, last, deflated, words = HEADER.unpack_from(stream, 2 * DIGEST)
    if version != VERSION:
        raise BrokenStreamError(f"its version is {version}, and {VERSION} is known")
    bits = int(shape[-1]) * 8
    if width not in WIDTHS or bits % width or not types or last >= 1 << width:
        raise BrokenStreamError("its header contradicts itself")
    rows, columns = int(shape[0]), math.prod(shape[1:-1]) * (bits // width)
    counts = (-(-(1 << width) // 8), types, deflated, lanes_for(rows, columns), words)
    occurring, weights, tables, states, coded_words = _parts(stream, counts)
    alphabet = np.flatnonzero(np.unpackbits(occurring, bitorder="little")).astype(np.uint8)
    if len(alphabet) != last + 1 or int(alphabet[-1]) >= 1 << width:
        raise BrokenStreamError("its header contradicts itself")
    circuit = _circuit(weights, tables.tobytes(), last + 1)
    places = decode(coded_words, states, circuit, rows, columns)
    packed = _packed(alphabet[places].reshape(*shape[:-1], -1), width)
    values = packed.view(dtype).reshape(tuple(shape))
    if _content(values) != stream[DIGEST : 2 * DIGEST]:
        raise BrokenStreamError("it decodes to another tensor")
    return values


def _parts(stream: bytes, counts: Sequence[int]) -> list[Array]:
    place, found = 2 * DIGEST + HEADER.size, []
    for count, kind in zip(counts, ("u1", "<u4", "u1", "<u4", "<u2"), strict=True):
        end = place + count * np.dtype(kind).itemsize
        if end > len(stream):
            raise BrokenStreamError("it ends too early")
        found.append(np.frombuffer(stream[place:end], kind))
        place = end
    if place != len(stream):
        raise BrokenStreamError("something is left over at the end")
    return found


def _circuit(weights: Array, tables: bytes, symbols: int) -> Circuit:
    whole = weights.astype(np.int64)
    if whole.min() < 1 or whole.sum() != WEIGHT:
        raise BrokenStreamError("the weights of its types are no distribution")
    count, inflate = len(whole) * symbols, zlib.decompressobj()
    try:
        raw = inflate.decompress(tables, count + 1)
    except zlib.error as error:
        raise BrokenStreamError("its tables cannot be inflated") from error
    levels = np.frombuffer(raw, np.uint8)
    if len(levels) != count or not inflate.eof or inflate.unused_data or levels.max() > MOST_LEVEL:
        raise BrokenStreamError("its tables do not belong to it")
    return Circuit(whole, levels.reshape(len(whole), symbols))


def _occurring(alphabet: Array, width: int) -> bytes:
    bits = np.zeros(1 << width, np.uint8)
    bits[alphabet] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _content(values: Array) -> bytes:
    head = f"{values.dtype.str}{values.shape}".encode()
    return _digest(head + np.ascontiguousarray(values).tobytes())


# ---- what is coded


def _widths(values: Array) -> list[int]:
    """Widths of a field that go into the last axis a whole number of times."""
    if values.dtype == np.int8:
        return [8]
    return [w for w in WIDTHS if values.shape[-1] * 8 % w == 0]


def _width(values: Array) -> int:
    found, fewest = 8, math.inf
    for width in _widths(values):
        fields = _fields(values, width)
        bits = _order0(fields) + 8 * len(np.unique(fields))
        if bits < (1 - WORTH) * fewest:
            found, fewest = width, bits
    return found


def _fields(values: Array, width: int) -> Array:
    """(..., n) uint8: the fields of so many bits along the last axis, low bits first."""
    raw = np.ascontiguousarray(values).view(np.uint8)
    if width == 8:
        return raw
    string = np.unpackbits(raw, axis=-1, bitorder="little")
    split = string.reshape(*raw.shape[:-1], -1, width)
    found: Array = (split << np.arange(width, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    return found


def _packed(fields: Array, width: int) -> Array:
    """(..., bytes) uint8: the inverse of `_fields`."""
    if width == 8:
        return fields
    string = (fields[..., None] >> np.arange(width, dtype=np.uint8)) & 1
    return np.packbits(string.reshape(*fields.shape[:-1], -1), axis=-1, bitorder="little")


def _order0(symbols: Array) -> float:
    """Bits of all the symbols together under one table, which is not counted."""
    counts = np.bincount(symbols.ravel())
    found = counts[counts > 0]
    return float(-(found * np.log2(found / symbols.size)).sum())


def _counts(places: Array, symbols: int) -> Array:
    """(rows, symbols) int64: how often each row has each symbol."""
    rows = len(places)
    flat = places + symbols * np.arange(rows)[:, None]
    found: Array = np.bincount(flat.ravel(), minlength=rows * symbols).reshape(rows, symbols)
    return found


def _best(counts: Array, most_types: int) -> Circuit:
    rows, symbols = counts.shape
    found, fewest = None, math.inf
    types = 1
    while types <= min(most_types, rows):
        circuit = fitted(counts, types)
        bits = float(circuit.bits(counts).sum()) + types * (8 * symbols + 32)
        if bits < (1 - WORTH) * fewest:
            found, fewest = circuit, bits
        types *= 2
    assert found is not None
    return found
