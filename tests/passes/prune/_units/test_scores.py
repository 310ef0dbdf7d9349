"""The five criteria by their formulas, on numbers that tell them apart."""

from __future__ import annotations

import numpy as np
import pytest

from graphwright.passes.prune._units.scores import CRITERIA, OF_HESSO, Sums, scores

SUMS = Sums(
    xx=np.array([4.0, 9.0, 16.0]),
    dd=np.array([1.0, 4.0, 25.0]),
    xd=np.array([1.0, -3.0, 8.0]),
    n=np.array([8.0, 2.0, 50.0]),
    size=np.array([5.0, 4.0, 20.0]),
    scale=np.array([1.5, 0.0, 3.0]),
    scales=np.array([1.0, 0.0, 2.0]),
)
EXPECTED = {
    "magnitude": [2.0, 3.0, 4.0],
    "l1": [5.0, 4.0, 20.0],
    "bn_scale": [1.5, 0.0, 1.5],
    "normalized_magnitude": [2 / 8, 3 / 2, 4 / 50],
    "cosine": [1 - 1 / 2, 1 + 3 / 6, 1 - 8 / 20],
    "taylor": [1.0, 3.0, 8.0],
    "taylor2": [0.5, 4.5, 32.0],
}
ALL = np.arange(3)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_its_formula(name: str) -> None:
    assert scores(name, SUMS, ALL) == pytest.approx(EXPECTED[name], rel=1e-5)


def test_a_long_unit_may_weigh_less_per_value_than_a_short_one() -> None:
    assert list(np.argsort(scores("magnitude", SUMS, ALL))) == [0, 1, 2]
    assert list(np.argsort(scores("normalized_magnitude", SUMS, ALL))) == [2, 0, 1]


def test_hesso_is_the_mean_of_all_five_in_units_of_their_norms() -> None:
    parts = [np.array(EXPECTED[criterion.__name__]) for criterion in OF_HESSO]
    expected = sum(part / np.linalg.norm(part) for part in parts) / 5
    assert scores("hesso", SUMS, ALL) == pytest.approx(expected, rel=1e-5)


def test_only_the_units_asked_for_are_scored() -> None:
    assert scores("magnitude", SUMS, np.array([2, 0])) == pytest.approx([4.0, 2.0])
