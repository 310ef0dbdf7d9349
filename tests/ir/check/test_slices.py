"""Errors of slices against norms written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphwright.ir.check.slices import is_astray, slice_errors


def test_errors_of_all_slices_along_all_axes() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 4, 5))
    b = a + 0.1 * rng.normal(size=a.shape)
    expected = [
        np.linalg.norm(np.take(a - b, i, axis)) / np.linalg.norm(np.take(a, i, axis))
        for axis in range(3)
        for i in range(a.shape[axis])
    ]
    found = slice_errors(torch.tensor(a), torch.tensor(b))
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    # slices along axis 0 have 20 values, along axis 1 15, along axis 2 12
    assert slice_errors(torch.tensor(a), torch.tensor(b), least=13).tolist() == pytest.approx(
        expected[:7], rel=1e-12
    )


def test_zeros_and_values_that_are_not_finite() -> None:
    inf = float("inf")
    a = torch.tensor([[1.0, 0.0, inf], [2.0, 0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0, inf], [2.0, 1.0, 2.0]])
    rows, columns = slice_errors(a, b)[:2], slice_errors(a, b)[2:]
    assert rows.tolist() == pytest.approx([0.0, (2 / 5) ** 0.5])
    assert columns.tolist() == [0.0, inf, 1.0]
    assert slice_errors(torch.tensor(1.0), torch.tensor(2.0)).numel() == 0


def test_zeros_that_another_order_of_a_sum_leaves_as_noise_are_equal() -> None:
    reference = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    noise, more = (reference + torch.tensor([0.0, size]) for size in (1e-6, 1e-5))
    assert slice_errors(reference, noise)[3] == 0.0
    assert slice_errors(reference, more)[3] == float("inf")
    # in float64 such noise is no rounding
    assert slice_errors(reference.double(), noise.double())[3] == float("inf")
    # and what is not zero in the reference is not lost either
    assert slice_errors(noise, reference)[3] == 1.0


def test_a_small_part_beside_a_large_one_is_seen() -> None:
    big, small = torch.randn(8, 6).double() * 1e6, torch.randn(8, 6).double() * 1e-6
    exact = torch.cat([big, small], 1)
    own = exact.float().double()
    lost = torch.cat([own[:, :6], torch.zeros(8, 6)], 1)
    assert not is_astray(exact, own, own, 1e-5)
    assert is_astray(exact, own, lost, 1e-5)
    # a part that its own precision loses as well is nobody's fault
    assert not is_astray(exact, lost, lost * 1.0, 1e-5)
