"""Ranges of activations: each estimator's own formula, and what it costs on common data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from graphwright.ir.calibration.ranges import (
    BINS,
    Histogram,
    mse_range,
    percentile_range,
    range_observer,
)
from graphwright.ir.errors import ArgumentError, GraphwrightError


def ranged(name: str, *batches: torch.Tensor, percentile: float = 99.99) -> tuple[float, float]:
    observer = range_observer(name, percentile)
    for batch in batches:
        observer.update(batch)
    return observer.range()


def gaussian(count: int = 40_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_min_max_takes_the_extremes_of_all_batches() -> None:
    assert ranged("min_max", torch.tensor([1.0, 5.0]), torch.tensor([-2.0, 3.0])) == (-2.0, 5.0)


def test_moving_average_follows_its_formula() -> None:
    low, high = ranged("moving_average", torch.tensor([0.0, 10.0]), torch.tensor([-5.0, 20.0]))
    assert (low, high) == (pytest.approx(-0.05), pytest.approx(10.1))


@pytest.mark.parametrize("name", ["percentile", "entropy", "mse"])
def test_one_outlier_does_not_stretch_the_range(name: str) -> None:
    # 400,000 values: coarser steps for all of them cost more than one clipped value does.
    x = torch.cat([gaussian(400_000), torch.tensor([30.0])])
    _, high = ranged(name, x, percentile=99.9)
    assert 2.0 < high < 20.0
    assert ranged("min_max", x)[1] == 30.0


def test_a_percentile_is_that_of_the_values() -> None:
    x = gaussian()
    low, high = ranged("percentile", *x.split(4000), percentile=99.0)
    # Half of the rest on each side, and within one histogram bin: the limit is at most twice the
    # largest value, over 2048 bins.
    expected = np.quantile(x.numpy(), [0.005, 0.995])
    assert [low, high] == pytest.approx(expected.tolist(), abs=2 * float(x.abs().max()) / 2048)


def test_mse_beats_min_max_on_heavy_tails() -> None:
    x = gaussian() ** 3

    def error(low: float, high: float) -> float:
        scale = (max(high, 0.0) - min(low, 0.0)) / 255
        codes = torch.round((x - min(low, 0.0)) / scale).clamp(0, 255)
        return float((codes * scale + min(low, 0.0) - x).square().mean())

    assert error(*ranged("mse", x)) < error(*ranged("min_max", x))


def test_growing_data_gives_the_range_of_the_data_at_once() -> None:
    x = gaussian() * torch.linspace(0.01, 4, 40_000)
    at_once, streamed = ranged("mse", x), ranged("mse", *x.split(1000))
    assert streamed == pytest.approx(at_once, rel=0.1)  # bins may be twice as wide


@pytest.mark.parametrize("name", ["percentile", "entropy", "mse"])
def test_too_few_values_are_refused(name: str) -> None:
    with pytest.raises(GraphwrightError, match="values"):
        ranged(name, torch.randn(10))


# ---- the entropy estimator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laplace(count: int) -> Tensor:
    return gaussian(count).sign() * -torch.log(torch.rand(count, generator=seeded(1)))


def pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), generator=seeded()).float()


DATA: dict[str, Callable[[], Tensor]] = {
    "relu": lambda: gaussian(200_000).relu(),
    "relu of few values": lambda: gaussian(4096).relu(),
    "relu that is mostly zero": lambda: (gaussian(200_000) - 1.6).relu(),
    "relu of laplace": lambda: laplace(200_000).relu(),
    "half dropped": lambda: gaussian(200_000) * (torch.rand(200_000, generator=seeded(2)) > 0.5),
    "black pixels": lambda: pixels(4096) * (torch.rand(4096, generator=seeded(2)) > 0.8),
    "relu6": lambda: (3 * gaussian(200_000)).clamp(0, 6),
    "normal": lambda: gaussian(200_000),
    "uniform": lambda: torch.rand(200_000, generator=seeded()),
    "laplace": lambda: laplace(200_000),
    "pixels": lambda: pixels(200_000),
}


def rounding_error(x: Tensor, low: float, high: float) -> float:
    """Relative error of x in uint8 over [low, high], extended to hold zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    codes = (torch.round(x / step) + zero).clamp(0, 255)
    return float(((codes - zero) * step - x).norm() / x.norm())


@pytest.mark.parametrize("name", DATA)
def test_entropy_keeps_what_a_spike_at_zero_outweighs(name: str) -> None:
    x = DATA[name]()
    whole = rounding_error(x, *ranged("min_max", x))
    assert rounding_error(x, *ranged("entropy", *x.split(1000))) < max(2 * whole, 0.004)


def divergence(magnitude: list[float], kept: int, levels: int) -> float:
    """KL divergence of the first bins, clipped mass in the last, from their coarse version."""
    p = magnitude[:kept]
    p[-1] += sum(magnitude[kept:])
    q = [0.0] * kept
    groups: dict[int, list[int]] = {}
    for i in range(kept):
        if magnitude[i] > 0:
            groups.setdefault(i * levels // kept, []).append(i)
    for group in groups.values():
        for i in group:
            q[i] = sum(magnitude[j] for j in group) / len(group)
    total_p, total_q = sum(p), sum(q)
    found = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            found += a / total_p * np.log(a / total_p / (b / total_q if b > 0 else 1e-10))
    return found


SPARSE: dict[str, Callable[[], Tensor]] = {
    "laplace and one outlier": lambda: torch.cat([laplace(5000), torch.tensor([24.0])]),
    "cubes": lambda: gaussian(1500) ** 3,
    "gaps": lambda: torch.cat([pixels(600), 3 * pixels(600) + 400]),
}


@pytest.mark.parametrize("name", SPARSE)
def test_entropy_is_the_least_divergence_of_128_levels(name: str) -> None:
    x = SPARSE[name]()
    histogram = range_observer("entropy")
    assert isinstance(histogram, Histogram)
    histogram.update(x)
    counts = histogram.counts
    magnitude = list(counts[BINS:] + counts[:BINS][::-1])
    magnitude[0] = magnitude[1]
    tried = range(128, BINS + 1, 8)
    best = min(tried, key=lambda kept: divergence(list(magnitude), kept, 128))
    low, high = histogram.range()
    assert high == pytest.approx(min(histogram.limit * best / BINS, float(x.max())))
    assert low == pytest.approx(max(-histogram.limit * best / BINS, float(x.min())))
    half = min(tried, key=lambda kept: divergence(list(magnitude), kept, 64))
    # another number of levels gives another threshold
    assert abs(half - best) > 8 or name != "laplace and one outlier"


# ---- the range of least squared error


def squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Squared error of the histogram's bin centers in uint8 over [low, high]."""
    centers = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    codes = np.clip(np.rint(centers / step) + zero, 0, 255)
    return float((histogram.counts * (centers - (codes - zero) * step) ** 2).sum())


OUTLIERS: dict[str, Callable[[], Tensor]] = {
    "left": lambda: torch.cat([gaussian(20_000), torch.tensor([-30.0, -12.0])]),
    "right": lambda: torch.cat([gaussian(20_000), torch.tensor([30.0, 12.0])]),
    "positive only": lambda: torch.cat([gaussian(20_000).abs() + 1, torch.tensor([30.0])]) / 100,
    "negative only": lambda: -torch.cat([gaussian(20_000).abs() + 1, torch.tensor([30.0])]) / 100,
}


@pytest.mark.parametrize("name", OUTLIERS)
def test_mse_searches_both_ends_together_then_each_alone(name: str) -> None:
    x = OUTLIERS[name]()
    histogram = Histogram(mse_range)
    histogram.update(x)
    ends = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = np.linspace(1.0, 0.2, 100)

    def error(pair: tuple[float, float]) -> float:
        return squared_error(histogram, *pair)

    together = min(((ends[0] * s, ends[1] * s) for s in shares), key=error)
    upper = min([together, *((together[0], ends[1] * s) for s in shares)], key=error)
    lower = min([upper, *((ends[0] * s, upper[1]) for s in shares)], key=error)
    assert histogram.range() == pytest.approx(
        (max(lower[0], float(x.min())), min(lower[1], float(x.max())))
    )
    if name in ("left", "right"):
        assert error(upper) < error(together)
    if name == "right":  # the last search is the one that shortens the side without outliers
        assert lower[0] > upper[0]
        assert error(lower) < 0.995 * error(upper)


@pytest.mark.parametrize("side", [1, -1])
def test_mse_of_one_side_keeps_zero_in_the_range(side: int) -> None:
    x = side * (gaussian(20_000).abs() + 1)
    low, high = ranged("mse", x)
    assert sorted(abs(v) for v in (low, high))[0] < 1.1  # the data's own end, or zero
    step = max(abs(low), abs(high)) / 255
    assert rounding_error(x, low, high) < 0.6 * step / float(x.abs().mean())


# ---- the histogram


def test_a_percentile_is_the_outer_edge_of_its_bin() -> None:
    histogram = Histogram(lambda h: percentile_range(h, 90.0))
    histogram.limit = float(BINS)  # bins of width 1, the first above zero is [0, 1)
    histogram.extremes.low, histogram.extremes.high = -BINS, BINS
    for place, count in ((-7, 10), (-3, 90), (2, 800), (5, 80), (9, 20)):
        histogram.counts[BINS + place] = count
    assert histogram.range() == (-3.0, 6.0)
    histogram.counts[BINS + 9] = 200
    assert histogram.range() == (-3.0, 10.0)
    histogram.counts[-1] = 5000
    assert histogram.range() == (2.0, BINS)


def test_a_histogram_counts_every_value_once_however_it_grows() -> None:
    parts = [torch.zeros(10), torch.tensor([0.3, -0.3]), torch.tensor([5.0, -0.1]), gaussian(1000)]
    histogram = Histogram(lambda h: (-1.0, 1.0))
    for seen, part in enumerate(parts, 1):
        histogram.update(part)
        assert histogram.counts.sum() == sum(len(p) for p in parts[:seen])
    x = torch.cat(parts).numpy()
    assert histogram.limit == pytest.approx(0.3 * 32)
    assert len(histogram.edges) == 2 * BINS + 1
    expected, _ = np.histogram(x, bins=histogram.edges)
    # A value on the edge of a bin of single precision may fall to either side of it.
    assert np.abs(histogram.counts - expected).sum() <= 4
    assert histogram.extremes.range() == (pytest.approx(x.min()), pytest.approx(x.max()))


def test_values_that_are_all_zero_have_the_range_zero() -> None:
    assert ranged("entropy", torch.zeros(300)) == (0.0, 0.0)
    assert ranged("percentile", torch.zeros(100), torch.zeros(156)) == (0.0, 0.0)


def test_an_estimate_never_leaves_the_data() -> None:
    histogram = Histogram(lambda h: (-100.0, 100.0))
    x = gaussian(1000)
    histogram.update(x)
    assert histogram.range() == (pytest.approx(float(x.min())), pytest.approx(float(x.max())))


def test_256_values_are_enough_and_255_are_not() -> None:
    assert ranged("mse", gaussian(256))[1] > 1.0
    with pytest.raises(ArgumentError, match=r"calibration gave 255 values, .* needs 256"):
        ranged("mse", gaussian(255))


def test_a_percentile_is_99_99_unless_said() -> None:
    plain, said = range_observer("percentile"), range_observer("percentile", 99.99)
    for observer in (plain, said):
        observer.update(gaussian())
    assert plain.range() == said.range() != ranged("percentile", gaussian(), percentile=99.9)


def test_an_unknown_estimator_and_an_average_of_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no range estimator named 'median'"):
        range_observer("median")
    with pytest.raises(ArgumentError, match="no calibration batch"):
        range_observer("moving_average").range()
