"""Figures as text, and lengths of bars."""

import pytest

from graphwright.report.charts import (
    count_text,
    error_text,
    figure_text,
    log_axis,
    log_share,
    share,
    size_text,
    time_text,
)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (size_text, 0, "0 B"), (size_text, 999, "999 B"), (size_text, 1000, "1 kB"),
        (size_text, 90_400_000, "90.4 MB"), (size_text, 999_600, "1 MB"), (size_text, None, "-"),
        (size_text, 5e15, "5000 TB"), (count_text, 22_713_216, "22.7 M"), (count_text, 12, "12"),
        (time_text, 0.0004, "0.4 ms"), (time_text, 0.0314, "31 ms"), (time_text, 3.42, "3.42 s"),
        (time_text, 125.7, "2 min 5 s"), (time_text, 0.99999, "1 s"), (time_text, None, "-"),
        (figure_text, 1.0, "1"), (figure_text, 0.99999951, "0.99999951"),
        (figure_text, 0.995, "0.995"), (figure_text, 0.99999, "0.99999"),
        (figure_text, 12.3456789, "12.3457"), (figure_text, None, "-"), (figure_text, -1.0, "-1"),
    ],
)  # fmt: skip
def test_texts(function, value, text):
    assert function(value) == text


def test_a_figure_below_one_never_reads_as_one():
    for exponent in range(3, 16):
        assert figure_text(1 - 10.0**-exponent) != "1"
        assert not figure_text(1 - 10.0**-exponent).startswith("1")


def test_error_texts():
    exact = {"max_abs": 0.0, "relative": 0.0, "cosine": 1.0, "snr_db": None}
    assert error_text(exact) == "none"
    assert (
        error_text({**exact, "max_abs": None, "relative": None, "cosine": None}) == "not comparable"
    )
    some = {"max_abs": 0.1, "relative": 0.0123, "cosine": 0.99992, "snr_db": 38.2}
    assert error_text(some) == "relative 0.012, cosine 0.99992"


def test_lengths():
    assert share(5, [5, 10, None]) == 50.0
    assert share(None, [1]) == share(1, []) == share(0, [0]) == 0.0
    low, high = log_axis([3e-7, 0.02, None, 0.0])
    assert (low, high) == pytest.approx((1e-7, 0.1))
    assert log_share(low, low, high) == 2.0  # still to be seen
    assert log_share(high, low, high) == 100.0
    assert log_share(None, low, high) == log_share(0.0, low, high) == 0.0
    assert log_axis([1e-3])[1] > log_axis([1e-3])[0]
    assert log_axis([]) == (1e-8, 1.0)
