"""Fidelity against the plain numpy formulas, and what it says where they have no value."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.check.fidelity import Fidelity, compare, merge


def reference_figures(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    error = np.linalg.norm(a - b)
    return (
        float(np.abs(a - b).max()),
        float(error / np.linalg.norm(a)),
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        float(20 * np.log10(np.linalg.norm(a) / error)),
    )


def figures(fidelity: Fidelity) -> tuple[float, float, float, float]:
    return fidelity.max_abs, fidelity.relative, fidelity.cosine, fidelity.snr_db


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(1e-6, 10.0))
def test_figures_equal_numpy(seed, rank, noise):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=rng.integers(1, 5, size=rank))
    b = a + noise * rng.normal(size=a.shape)
    # 1e-9: both sides are float64 sums of at most 4**5 terms
    assert figures(compare(torch.tensor(a), torch.tensor(b))) == pytest.approx(
        reference_figures(a, b), rel=1e-9, abs=1e-9
    )


def test_float32_sums_are_accumulated_in_float64():
    a = torch.full((3_000_000,), 0.1)  # a float32 running sum of squares is off by per cents here
    b = a * 1.001
    expected = reference_figures(a.numpy(), b.numpy())
    assert figures(compare(a, b)) == pytest.approx(expected, rel=1e-9)


def test_strided_views_and_nests():
    a = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    b = a + 0.01
    nested = compare({"x": (a.T, [a[::2]])}, {"x": (b.T, [b[::2]])})
    flat = compare([a.T.contiguous(), a[::2].clone()], [b.T.contiguous(), b[::2].clone()])
    assert figures(nested) == pytest.approx(figures(flat))
    assert nested.elements == 72


def test_merge_equals_one_piece():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(10, 4)), rng.normal(size=(10, 4))
    whole = compare(a, b)
    parts = merge(compare(a[i : i + 3], b[i : i + 3]) for i in range(0, 10, 3))
    assert figures(parts) == pytest.approx(figures(whole))
    assert parts.elements == whole.elements == 40


def test_equal_outputs():
    a = torch.randn(5, generator=torch.Generator().manual_seed(0))
    same = compare(a, a.clone())
    assert same.is_exact
    assert figures(same) == (0.0, 0.0, 1.0, math.inf)
    assert same.as_dict() == {"max_abs": 0.0, "relative": 0.0, "cosine": 1.0, "snr_db": None}


def test_matching_infinities_agree():
    a = torch.tensor([1.0, -math.inf, math.nan, 2.0])
    b = torch.tensor([1.0, -math.inf, math.nan, 2.5])
    result = compare(a, b)
    assert result.broken == 0
    assert figures(result) == pytest.approx(reference_figures(np.r_[1.0, 2.0], np.r_[1.0, 2.5]))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, math.inf], [1.0, 2.0]),
        ([1.0, math.inf], [1.0, -math.inf]),
    ],
)
def test_one_sided_nan_or_infinity_is_broken(a, b):
    result = compare({"logits": torch.tensor(a)}, {"logits": torch.tensor(b)})
    assert result.broken == 1
    assert result.max_abs == math.inf
    assert result.relative == math.inf
    assert math.isnan(result.cosine)
    assert result.notes == ("output logits: NaN or infinity on one side only",)
    json.dumps(result.as_dict(), allow_nan=False)
    # a broken batch is not averaged away by good ones
    assert merge([compare(1.0, 1.0), result, compare(1.0, 1.0)]).relative == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_finite_is_no_agreement(value):
    blank = compare(torch.full((4,), value), torch.full((4,), value))
    assert blank.blank
    assert not blank.is_exact
    assert (blank.elements, blank.skipped, blank.broken) == (0, 4, 0)
    assert all(math.isnan(figure) for figure in figures(blank)[1:])
    assert set(blank.as_dict().values()) == {None}
    assert str(blank) == "nothing was compared: no value of the outputs is finite"
    both = merge([blank, compare(torch.ones(2), torch.ones(2))])
    assert (both.relative, both.cosine, both.elements, both.skipped) == (0.0, 1.0, 2, 4)


def test_within_is_about_what_was_compared():
    one = torch.ones(4)
    off = compare(one, one * 1.5)
    assert off.within(0.5)
    assert not off.within(0.49)
    assert compare(one * math.nan, one * math.nan).within(0.0)
    assert not compare(one, one * math.nan).within(math.inf)
    assert not compare(torch.zeros(4), one).within(1e9)


def test_an_output_that_vanishes_is_wiped():
    one = torch.ones(3)
    assert compare(one, 0 * one).wiped
    assert not compare(0 * one, 0 * one).wiped
    assert not compare(one, torch.tensor([0.0, 0.0, 1e-30])).wiped


def test_shape_and_structure_differences_are_broken_and_said():
    shapes = compare({"y": torch.zeros(2, 3)}, {"y": torch.zeros(3, 2)})
    assert shapes.broken
    assert shapes.notes == ("output y: shape (2, 3) became (3, 2)",)
    nests = compare({"y": torch.ones(2)}, {"z": torch.ones(2)})
    assert nests.broken
    assert "missing ['y'], unexpected ['z']" in nests.notes[0]
    assert "became" in str(shapes)


def test_dtype_difference_is_compared_by_value_and_noted():
    result = compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float16))
    assert result.is_exact
    assert result.notes == ("the output: float32 became float16",)


def test_zero_reference_and_nothing_compared():
    zero = torch.zeros(3)
    assert figures(compare(zero, zero)) == (0.0, 0.0, 1.0, math.inf)
    off = compare(zero, torch.ones(3))
    assert figures(off) == (1.0, math.inf, 0.0, -math.inf)
    assert "all zeros" in off.notes[0]
    empty = compare(torch.zeros(0), torch.zeros(0))
    assert not empty.is_exact
    assert "nothing was compared" in empty.notes[0]
    # the remark is about the total, not about one batch of it
    assert merge([off, compare(torch.ones(3), torch.ones(3))]).notes == ()


def test_integers_booleans_complex_numbers_and_none():
    assert compare([torch.tensor([1, 2]), None, 3], [torch.tensor([1, 4]), None, 3]).max_abs == 2.0
    assert compare(torch.tensor([True]), torch.tensor([False])).max_abs == 1.0
    assert compare(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])).max_abs == 2.0


def test_worst_output_is_named():
    a = {"small": torch.zeros(2), "big": torch.zeros(2)}
    b = {"small": torch.full((2,), 0.1), "big": torch.full((2,), 3.0)}
    assert compare(a, b).worst == "big"
