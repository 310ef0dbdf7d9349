"""Damaged and made-up streams of the entropy coder: refused, or the very tensor."""

from __future__ import annotations

import numpy as np

from graphwright.ir.files.entropy import coder, stream


def gaussian(rows: int, columns: int, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """Codes of Gaussian weights with one scale, rows of unlike spread."""
    g = np.random.default_rng(seed)
    w = g.normal(size=(rows, columns)) * np.exp(spread * g.normal(size=(rows, 1)))
    return np.round(w / np.abs(w).max() * 127).astype(np.int8)


def resealed(body: bytes) -> bytes:
    """A stream with a checksum that fits: what somebody who means harm writes."""
    return stream._digest(body) + body


def is_refused(data: bytes, values: np.ndarray, shape: tuple[int, ...] | None = None) -> bool:
    """Whether it is refused; else it has to be the very tensor."""
    try:
        found = stream.decoded(data, values.dtype, shape or values.shape)
    except coder.BrokenStreamError:
        return True
    assert found.shape == values.shape
    np.testing.assert_array_equal(found, values)
    return False


def fuzz(count: int, seed: int) -> int:
    """Damages streams `count` times, half of them with a fitting checksum; returns the refusals."""
    g = np.random.default_rng(seed)
    tensors = [gaussian(20, 20, 1.0) >> 3, gaussian(20, 20) & 3]
    made = [stream.coded(values, k) for values, k in zip(tensors, (4, 1), strict=True)]
    refused = 0
    for index in range(count):
        which = index % 2
        values, one = tensors[which], made[which]
        assert one is not None
        data = bytearray(one.stream)
        for _ in range(int(g.integers(1, 4))):
            kind, place = g.integers(0, 5), int(g.integers(0, max(len(data), 1)))
            if kind == 0:
                del data[place:]
            elif kind == 1:
                data[place : place + 1] = bytes([int(g.integers(0, 256))])
            elif kind == 2 and data:
                data[place] ^= 1 << int(g.integers(0, 8))
            elif kind == 3:
                data[place:place] = g.bytes(int(g.integers(1, 9)))
            elif data:  # into the header, where numbers steer what is read
                place = min(16 + int(g.integers(0, 24)), len(data) - 1)
                data[place] = int(g.choice([0, 1, 2, 255, int(g.integers(0, 256))]))
        body = bytes(data[8:])
        refused += is_refused(resealed(body) if index % 4 < 2 else bytes(data), values)
    return refused
