"""The entropy coder: exact, near the circuit's own likelihood, and safe against any stream."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hostile.streams import fuzz, gaussian, is_refused, resealed

from graphwright.ir.files.entropy import circuit as circuits
from graphwright.ir.files.entropy import coder, stream


def random_circuit(types: int, symbols: int, seed: int = 0) -> circuits.Circuit:
    g = np.random.default_rng(seed)
    weights = circuits.integers(g.dirichlet(np.ones(types)), circuits.WEIGHT)
    return circuits.Circuit(weights, g.integers(50, 128, (types, symbols)).astype(np.uint8))


def drawn(made: circuits.Circuit, rows: int, columns: int, seed: int = 1) -> np.ndarray:
    g = np.random.default_rng(seed)
    kinds = g.choice(made.types, rows, p=made.weights / circuits.WEIGHT)
    p = made.frequencies / circuits.SCALE
    return np.stack([g.choice(p.shape[1], columns, p=p[k]) for k in kinds])


@pytest.mark.parametrize(("types", "symbols"), [(1, 1), (1, 7), (3, 16), (5, 130), (64, 256)])
@pytest.mark.parametrize(("rows", "columns", "lanes"), [(1, 40, 1), (7, 13, 3), (30, 9, 30)])
def test_what_is_coded_comes_back(
    types: int, symbols: int, rows: int, columns: int, lanes: int
) -> None:
    made = random_circuit(types, symbols)
    given = np.random.default_rng(2).integers(0, symbols, (rows, columns))  # not as it expects
    words, states = coder.encode(given, made, lanes)
    np.testing.assert_array_equal(coder.decode(words, states, made, rows, columns), given)


def test_conditionals_are_exact_and_their_product_is_the_joint() -> None:
    made = random_circuit(3, 9)
    rows = drawn(made, 20, 30)
    _, sizes = coder._intervals(rows, made)
    p, pi = made.frequencies / circuits.SCALE, made.weights / circuits.WEIGHT
    joint = np.array([sum(pi[k] * np.prod(p[k][row]) for k in range(3)) for row in rows])
    product = (sizes / circuits.SCALE).prod(1)
    np.testing.assert_allclose(product, joint, rtol=0.05)  # 30 roundings to 16 bits
    counts = np.stack([np.bincount(row, minlength=9) for row in rows])
    np.testing.assert_allclose(made.bits(counts), -np.log2(joint), rtol=1e-10)
    # the intervals of all symbols that may come next part the whole range, behind any beginning
    for column in (0, 1, 17):
        ends = 0
        for symbol in range(9):
            one = rows.copy()
            one[:, column] = symbol
            first, size = (part[:, column] for part in coder._intervals(one, made))
            np.testing.assert_array_equal(first, ends)
            assert size.min() >= 1
            ends = first + size
        np.testing.assert_array_equal(ends, circuits.SCALE)


def test_a_stream_is_as_long_as_the_circuit_says() -> None:
    made = random_circuit(4, 16)
    rows = drawn(made, 64, 512)
    lanes = coder.lanes_for(*rows.shape)
    words, _ = coder.encode(rows, made, lanes)
    counts = np.stack([np.bincount(row, minlength=16) for row in rows])
    ideal = made.bits(counts).sum()
    assert ideal < 16 * (len(words) + lanes) < 1.003 * ideal


def test_expectation_maximization_finds_the_types() -> None:
    true = circuits.Circuit(
        circuits.integers(np.array([0.4, 0.6]), circuits.WEIGHT),
        random_circuit(2, 6, seed=3).levels,
    )
    rows = drawn(true, 400, 60)
    counts = np.stack([np.bincount(row, minlength=6) for row in rows])
    one, two = (circuits.fitted(counts, k) for k in (1, 2))
    np.testing.assert_allclose(one.frequencies[0] / circuits.SCALE, counts.sum(0) / counts.sum(),
                               rtol=0.05)  # fmt: skip
    order = np.argsort(two.weights)
    wanted = np.argsort(true.weights)
    np.testing.assert_allclose(
        two.frequencies[order] / circuits.SCALE, true.frequencies[wanted] / circuits.SCALE,
        atol=0.03,
    )  # fmt: skip
    assert two.bits(counts).sum() <= true.bits(counts).sum() * 1.001 < one.bits(counts).sum()


def test_what_there_is_to_gain() -> None:
    """Nothing beyond order 0 where rows are alike; much where they are not."""
    alike = stream.coded(gaussian(256, 256), 8)
    unlike = stream.coded(gaussian(256, 256, spread=1.0), 8)
    assert alike is not None
    assert unlike is not None
    assert alike.types == 1
    assert alike.entropy < alike.bits < alike.entropy + 0.15
    assert unlike.types > 1
    assert unlike.bits < unlike.entropy - 0.2


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_of_every_width(bits: int) -> None:
    import torch

    from graphwright.ir.ops.blocks import pack_codes

    g = np.random.default_rng(bits)
    codes = g.binomial(2**bits - 1, 0.3, (64, 4, 64)).astype(np.uint8)
    values = pack_codes(torch.from_numpy(codes), bits).numpy()
    made = stream.coded(values, 4)
    assert made is not None
    assert made.width == bits
    np.testing.assert_array_equal(stream.decoded(made.stream, values.dtype, values.shape), values)


def test_what_cannot_be_smaller_is_left_alone() -> None:
    g = np.random.default_rng(0)
    assert stream.coded(g.integers(-128, 128, (64, 128)).astype(np.int8), 8) is None
    assert stream.coded(np.zeros((512, 512), np.int8), 8) is None  # beyond what a file may claim
    for values, why in (
        (np.zeros((64, 64), np.int32), "int32 is no dtype"),
        (np.zeros(8192, np.int8), "no rows"),
        (np.zeros((2, 200000), np.int8), "more than 65536 bytes"),
        (np.zeros((8, 8), np.int8), "64 bytes, which are too few"),
    ):
        assert why in stream.refusal(values, 4096)


# ---- damage


def test_thousands_of_damaged_streams_are_refused() -> None:
    count = 2000
    assert fuzz(count, 0) > 0.95 * count  # the rest are the streams themselves


def test_every_flip_and_every_cut_is_found() -> None:
    values = gaussian(20, 20, 1.0) >> 3
    made = stream.coded(values, 4)
    assert made is not None
    for place in range(len(made.stream)):
        flipped = bytearray(made.stream)
        flipped[place] ^= 1 << place % 8
        assert is_refused(bytes(flipped), values)
        assert is_refused(made.stream[:place], values)
    assert is_refused(made.stream + b"\0", values)
    for shape in ((10, 40), (20, 21), (400,), (2**40, 20), (0, 20)):
        with pytest.raises(coder.BrokenStreamError):
            stream.decoded(made.stream, values.dtype, shape)
    with pytest.raises(coder.BrokenStreamError):
        stream.decoded(made.stream, np.dtype(np.uint8), values.shape)


def test_a_newer_version_says_so() -> None:
    values = gaussian(24, 40, 1.0)
    made = stream.coded(values, 4)
    assert made is not None
    body = made.stream[8:16] + struct.pack("<B", 9) + made.stream[17:]
    with pytest.raises(coder.BrokenStreamError, match="version is 9"):
        stream.decoded(resealed(body), values.dtype, values.shape)
