"""quantize.adaquant with `method: nelder_mead`: ranges found without gradients."""

from __future__ import annotations

from itertools import product as every

import pytest
import torch
from models.heavy_tailed import heavy_tailed, layer, samples
from torch import Tensor

from graphwright.ir.layers.products import Geometry, product
from graphwright.passes.quantize._math import adaquant, range_search


def with_outliers() -> tuple[Geometry, Tensor, Tensor, Tensor]:
    """A layer, its bias, and inputs; one weight of a row and one sample are far from the rest."""
    g, weight, bias = layer()
    weight = weight.clamp(-0.2, 0.2)
    weight[:, 3] += torch.linspace(-0.9, 0.9, 16)
    x = heavy_tailed(200).clamp(-1, 1)
    x[7] *= 20
    return g, weight, bias, x


def searched(
    g: Geometry, weight: Tensor, bias: Tensor | None, x: Tensor, iterations: int, **changes: object
) -> adaquant.Learned:
    values: dict[str, object] = {
        "bits": 4, "activation_bits": None, "block": g.depth, "symmetric": False, "batch": 50,
        "rate": 1e-4, "bias_rate": 1e-3, "range_rate": 1e-3, "input_rate": 1e-2,
        "method": "nelder_mead",
    }  # fmt: skip
    s = adaquant.AdaquantSettings(**{**values, **changes}, iterations=iterations)  # type: ignore[arg-type]
    return adaquant.learn(g, weight, bias, samples(x), s, False, 0)


def relative_error(
    g: Geometry, weight: Tensor, bias: Tensor | None, x: Tensor, found: adaquant.Learned
) -> float:
    """In float64, from the codes that were found."""
    seen = x.double()
    if found.grid is not None:
        scale, zero, low, high = found.grid
        seen = ((seen / scale + zero).round().clamp(low, high) - zero) * scale
    value = (found.codes.double() - found.zero.double()) * found.scale.double()
    shift = None if bias is None else bias.double()
    y = product(g, seen, value.reshape(weight.shape), shift)
    target = product(g, x.double(), weight.double(), shift)
    return float((y - target).norm() / target.norm())


def test_the_search_finds_the_minimum_of_a_bowl() -> None:
    low, span = torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 4.0])
    low_x, span_x = torch.tensor(0.0), torch.tensor(5.0)
    wanted = (torch.tensor([-1.4, -3.8]), torch.tensor([2.6, 5.2]))  # scale 1.3, shift -0.2

    def error() -> float:
        gap = (low - wanted[0]).square().sum() + (span - wanted[1]).square().sum()
        return float((gap + (low_x - 1.0).square() + (span_x - 4.0).square() + 0.01).sqrt())

    ranges = [range_search.Range(low, span, True), range_search.Range(low_x, span_x, True)]
    first = error()
    assert range_search.search(ranges, error, 0) == first
    left = range_search.search(ranges, error, 1000)
    assert left == pytest.approx(0.1, abs=1e-4)
    torch.testing.assert_close(low, wanted[0], atol=5e-3, rtol=0)
    torch.testing.assert_close(span, wanted[1], atol=5e-3, rtol=0)
    assert float(low_x) == pytest.approx(1.0, abs=5e-3)
    assert float(span_x) == pytest.approx(4.0, abs=5e-3)


def test_a_range_around_zero_is_only_scaled() -> None:
    low, span = torch.tensor([-1.0]), torch.tensor([2.0])
    calls = 0

    def error() -> float:
        nonlocal calls
        calls += 1
        return abs(float(span) - 1.5) + 0.1

    range_search.search([range_search.Range(low, span, False)], error, 1000)
    assert float(low) == -1.0
    assert float(span) == pytest.approx(1.5, abs=1e-3)
    span.fill_(2.0)
    calls = 0
    range_search.search([range_search.Range(low, span, False)], error, 2)
    assert calls < 12  # two moves of a simplex of two corners


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [None, 8])
def test_searched_ranges_are_never_worse_than_min_and_max(bits: int, inputs: int | None) -> None:
    torch.manual_seed(0)
    conv = Geometry("conv2d", (6, 2, 3, 3), 2, (1, 1), ((1, 1), (1, 1)), (1, 1))
    cases = [
        (*layer(), heavy_tailed(100)),
        with_outliers(),
        (conv, torch.randn(6, 2, 3, 3), None, torch.randn(20, 4, 6, 6).relu()),
    ]
    for g, weight, bias, x in cases:
        plain = searched(g, weight, bias, x, 0, bits=bits, activation_bits=inputs)
        found = searched(g, weight, bias, x, 500, bits=bits, activation_bits=inputs)
        errors = [relative_error(g, weight, bias, x, one) for one in (plain, found)]
        assert errors[1] <= errors[0] * (1 + 1e-6)
        assert found.before == pytest.approx(errors[0], rel=1e-3)
        assert found.after == pytest.approx(errors[1], rel=1e-3)


def test_ranges_open_for_outliers() -> None:
    """Means over samples hide the one sample that is far out."""
    g, weight, bias, x = with_outliers()
    plain = searched(g, weight, bias, x, 0, bits=8, activation_bits=8)
    found = searched(g, weight, bias, x, 500, bits=8, activation_bits=8)
    assert relative_error(g, weight, bias, x, found) < 0.25 * relative_error(
        g, weight, bias, x, plain
    )


def on_grid(value: Tensor, low: Tensor, span: Tensor, bits: int) -> Tensor:
    """The quantizer of the paper, in float64."""
    top = 2**bits - 1
    step = span / top
    zero = (-low / step).round().clamp(0, top)
    return ((value / step + zero).round().clamp(0, top) - zero) * step


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("is_rectified", [False, True])
def test_a_grid_of_scales_and_shifts_holds_nothing_much_better(
    bits: int, is_rectified: bool
) -> None:
    """50625 points around the start, in float64, from the formulas alone."""
    g, weight, bias, _ = with_outliers()
    x = heavy_tailed(120).clamp(0 if is_rectified else -1, 1)
    found = searched(g, weight, bias, x, 500, bits=bits, activation_bits=bits)
    w, seen = weight.double(), x.double()
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    span = high - low
    low_x, span_x = samples(x).low, samples(x).high - samples(x).low

    def line(low: float, high: float, count: int) -> list[Tensor]:
        return list(torch.linspace(low, high, count, dtype=torch.float64))

    inputs = torch.stack([
        on_grid(seen, low_x + shift * span_x, scale * span_x, bits)
        for scale, shift in every(line(0.5, 2, 25), line(-1, 0.5, 25))
    ])  # fmt: skip
    target = seen @ w.T
    best = min(
        float((inputs @ on_grid(w, low + shift * span, scale * span, bits).T - target)
              .flatten(1).norm(dim=1).min())
        for scale, shift in every(line(0.8, 1.2, 9), line(-0.1, 0.1, 9))
    )  # fmt: skip
    best /= float((target + bias.double()).norm())
    assert relative_error(g, weight, bias, x, found) < 1.1 * best


def test_no_steps_of_the_search_are_rounding_to_nearest_too() -> None:
    g, weight, bias = layer()
    x = heavy_tailed(50)
    still = searched(g, weight, bias, x, 0, activation_bits=8)
    plain = searched(g, weight, bias, x, 0, activation_bits=8, method="adam")
    assert torch.equal(still.codes, plain.codes)
    assert torch.equal(still.scale, plain.scale)
    assert still.grid == plain.grid
    assert still.after == still.before
