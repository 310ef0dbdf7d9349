"""The range coder: a row's next symbol by its conditional given the row so far.

It is the range variant of asymmetric numeral systems, with 32-bit states and words of 16 bits.
Rows are spread over lanes, which are worked on together: step by step every lane codes a symbol of
its own row, and the words of all lanes are one stream in that order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphwright.ir.files.entropy.circuit import (
    SCALE,
    SCALE_BITS,
    WEIGHT_BITS,
    Array,
    Circuit,
    updated,
)

LOW = 1 << 16
"""Least state; one lane's states are in [LOW, LOW**2)."""

PER_LANE = 2048
"""Symbols that a lane has at least: its state costs 16 bits."""

MOST_LANES = 1 << 14

BLOCK = 16
"""Symbols that a search looks at together."""


class BrokenStreamError(ValueError):
    """A stream that no encoder has written."""


def lanes_for(rows: int, columns: int) -> int:
    """The number of lanes for so many rows and columns, at least 1."""
    return max(1, min(rows, MOST_LANES, rows * columns // PER_LANE))


def encode(symbols: Array, circuit: Circuit, lanes: int) -> tuple[Array, Array]:
    """Words (uint16) and states (lanes, uint32) of symbols (R, C), each below S."""
    states = np.full(lanes, LOW, np.int64)
    words: list[Array] = []
    for block in reversed(list(_rounds(len(symbols), lanes))):
        starts, sizes = _intervals(symbols[block], circuit)
        active = len(starts)
        for column in range(symbols.shape[1] - 1, -1, -1):
            start, size = starts[:, column].astype(np.int64), sizes[:, column].astype(np.int64)
            x = states[:active]
            full = x >= size << (32 - SCALE_BITS)
            words.append((x[full] & (LOW - 1)).astype(np.uint16))
            x = np.where(full, x >> 16, x)
            states[:active] = (x // size << SCALE_BITS) + x % size + start
    words.reverse()
    stream = np.concatenate(words) if words else np.zeros(0, np.uint16)
    return stream, states.astype(np.uint32)


def decode(words: Array, states: Array, circuit: Circuit, rows: int, columns: int) -> Array:
    """The symbols (rows, columns) uint8 that `encode` was given; there are 256 at most.

    Raises:
        BrokenStreamError: the stream ends too early or too late.
    """
    x = states.astype(np.int64)
    if len(x) < 1 or bool((x < LOW).any()):
        raise BrokenStreamError("a state is out of range")
    found = np.empty((rows, columns), np.uint8)
    reader = _Words(words)
    for block in _rounds(rows, len(x)):
        part = found[block]
        state = x[: len(part)]
        for column, taken in enumerate(_symbols(state, circuit, reader, columns)):
            part[:, column] = taken
    if reader.place != len(words) or bool((x != LOW).any()):
        raise BrokenStreamError("something is left over at the end")
    return found


def _rounds(rows: int, lanes: int) -> Iterator[slice]:
    """Rows that the lanes code together."""
    for first in range(0, rows, lanes):
        yield slice(first, min(first + lanes, rows))


class _Words:
    """The stream of words, read from the front."""

    def __init__(self, words: Array) -> None:
        self.words, self.place = words.astype(np.int64), 0

    def refill(self, state: Array) -> None:
        """Gives every state that is below its range one word, in the order of the lanes."""
        empty = np.flatnonzero(state < LOW)
        end = self.place + len(empty)
        if end > len(self.words):
            raise BrokenStreamError("the stream ends too early")
        state[empty] = (state[empty] << 16) | self.words[self.place : end]
        self.place = end


def _symbols(state: Array, circuit: Circuit, reader: _Words, columns: int) -> Iterator[Array]:
    """The next symbol of every lane (L,), `columns` times; `state` is moved on in place."""
    rows = len(state)
    frequencies, cumulative = circuit.frequencies, circuit.cumulative()
    if circuit.types == 1:
        table = np.repeat(np.arange(frequencies.shape[1]), frequencies[0])
        for _ in range(columns):
            slot = state & (SCALE - 1)
            symbol = table[slot]
            state[:] = (
                frequencies[0][symbol] * (state >> SCALE_BITS) + slot - (cumulative[0][symbol])
            )
            reader.refill(state)
            yield symbol
        return
    search, by_symbol = _Search(cumulative), np.ascontiguousarray(frequencies.T)
    weights = np.repeat(circuit.weights[None], rows, 0)
    for _ in range(columns):
        slot = state & (SCALE - 1)
        symbol, start, end = search(weights, slot)
        state[:] = (end - start) * (state >> SCALE_BITS) + slot - start
        reader.refill(state)
        weights = updated(weights, by_symbol[symbol])
        yield symbol


class _Search:
    """Finds the symbol whose interval under a mixture holds a slot: first its block, then itself.

    Every interval is at least 1 wide, for every type gives every symbol at least that.
    """

    def __init__(self, cumulative: Array) -> None:
        """Takes the (K, S + 1) sums of the frequencies in front of every symbol."""
        types, ends = cumulative.shape
        padding = np.full((types, -(ends - 1) % BLOCK), SCALE)
        padded = np.concatenate([cumulative, padding], 1)
        self.blocks = np.ascontiguousarray(padded[:, ::BLOCK])
        places = BLOCK * np.arange(self.blocks.shape[1] - 1)[:, None] + np.arange(BLOCK + 1)
        self.inside = np.ascontiguousarray(padded[:, places].transpose(1, 0, 2))

    def __call__(self, weights: Array, slot: Array) -> tuple[Array, Array, Array]:
        """Symbol, first slot and end of its interval, each (L,) int64.

        Args:
            weights: (L, K). slot: (L,), each below SCALE.
        """
        bounds = (weights @ self.blocks) >> WEIGHT_BITS
        block = (bounds[:, 1:] <= slot[:, None]).sum(1)
        bounds = (weights[:, :, None] * self.inside[block]).sum(1) >> WEIGHT_BITS
        within = (bounds[:, 1:] <= slot[:, None]).sum(1)
        lane = np.arange(len(slot))
        return block * BLOCK + within, bounds[lane, within], bounds[lane, within + 1]


def _intervals(symbols: Array, circuit: Circuit) -> tuple[Array, Array]:
    """First slot and width, each (L, C) uint32, of every symbol given the row in front of it."""
    cumulative, frequencies = circuit.cumulative(), circuit.frequencies
    if circuit.types == 1:
        return (cumulative[0][symbols].astype(np.uint32),
                frequencies[0][symbols].astype(np.uint32))  # fmt: skip
    starts, ends = (np.empty(symbols.shape, np.uint32) for _ in range(2))
    before, by_symbol = (np.ascontiguousarray(part.T) for part in (cumulative, frequencies))
    weights = np.repeat(circuit.weights[None], len(symbols), 0)
    for column in range(symbols.shape[1]):
        symbol = symbols[:, column]
        starts[:, column] = (weights * before[symbol]).sum(1) >> WEIGHT_BITS
        ends[:, column] = (weights * before[symbol + 1]).sum(1) >> WEIGHT_BITS
        weights = updated(weights, by_symbol[symbol])
    return starts, ends - starts
