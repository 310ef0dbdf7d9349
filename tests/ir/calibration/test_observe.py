from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.calibration.observe import observe, range_observer
from graphwright.ir.errors import GraphwrightError


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


def test_observers_see_every_batch_of_the_nodes_they_watch() -> None:
    program = gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),), {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    watch = range_observer("min_max", 99.9)
    batches = [(torch.randn(2, 3),), (torch.randn(5, 3),)]
    observe(program, {node.name: watch}, batches)
    values = torch.cat([program(*b) for b in batches]).detach()
    assert watch.range() == (pytest.approx(float(values.min())), pytest.approx(float(values.max())))


def test_nan_and_no_batch_at_all_are_refused() -> None:
    program = gw.trace(nn.Linear(3, 2), (torch.randn(4, 3),), {"input": {0: "n"}})
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    for batches in ([], [(torch.full((2, 3), float("nan")),)]):
        watch = range_observer("min_max", 99.9)
        with pytest.raises(GraphwrightError):
            observe(program, {node.name: watch}, batches)
