"""Masks: exact counts, ties, N:M, and the options that ask for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune._masks.patterns import Pattern, found_pattern
from graphwright.passes.prune.wanda import Wanda


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 0.999),
    seed=st.integers(0, 1000),
)
def test_lowest_scores_go_and_the_count_is_exact(rows, columns, sparsity, seed):
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    for scope, size, lines in (("row", columns, rows), ("layer", rows * columns, 1)):
        keep = Pattern(sparsity).keep(score, scope).reshape(lines, -1)
        assert bool(((~keep).sum(1) == int(size * sparsity + 1e-9)).all())
        for line, kept in zip(score.reshape(lines, -1), keep, strict=True):
            if bool(kept.any()) and not bool(kept.all()):
                assert line[kept].min() >= line[~kept].max()


@given(
    n=st.integers(1, 7), extra=st.integers(1, 8), groups=st.integers(2, 5), rows=st.integers(1, 5)
)
def test_n_of_m_stay_in_every_group_and_the_pattern_is_found_again(n, extra, groups, rows):
    m = n + extra
    score = torch.rand(rows, groups * m)
    keep = Pattern.parse(f"{n}:{m}", None).keep(score)
    assert bool((keep.reshape(rows, groups, m).sum(2) == n).all())
    if m in (4, 8):
        found = found_pattern(keep)
        assert found.m == 2 or found.m * n == found.n * m  # a finer pattern may hold by chance
        assert found.sparsity == pytest.approx(1 - n / m)


def test_equal_scores_go_in_order():
    keep = Pattern(0.5).keep(torch.ones(1, 6), "layer")
    assert keep.tolist() == [[False, False, False, True, True, True]]


def test_a_share_that_is_a_rounded_product_counts_as_the_product():
    assert Pattern(0.29).count(100) == 29  # 100 * 0.29 is 28.999999999999996


@pytest.mark.parametrize("columns", [4, 16, 32, 64])
def test_an_unstructured_mask_is_not_mistaken_for_a_pattern(columns):
    keep = Pattern(0.5).keep(torch.rand(16, columns))
    assert found_pattern(keep) == Pattern(pytest.approx(0.5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "4:4"}, "N must be below M"),
        ({"pattern": "2:0"}, "pattern"),
        ({"pattern": "half"}, "pattern"),
        ({"pattern": "2:4", "sparsity": 0.6}, "a sparsity of its own"),
        ({"sparsity": 1.0}, "sparsity"),
    ],
)
def test_options_that_disagree_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        Wanda(**options)


def test_a_pattern_and_its_own_sparsity_agree():
    assert Wanda(pattern="2:8", sparsity=0.75).options.wanted() == Pattern(0.75, 2, 8)
    assert Wanda().options.wanted() == Pattern(0.5)
    again = Wanda(**Wanda(pattern="2:4").resolved_options())
    assert again.options.wanted() == Pattern(0.5, 2, 4)
