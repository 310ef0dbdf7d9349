from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.passes.quantize._math import int8


@given(
    rows=st.integers(1, 9), width=st.integers(1, 17), seed=st.integers(0, 99),
    axis=st.sampled_from([0, 1]), estimate=st.sampled_from(["min_max", "mse"]),
    hold_pairs=st.booleans(),
)  # fmt: skip
def test_codes_lie_on_the_grid_and_near_the_weight(
    rows: int, width: int, seed: int, axis: int, estimate: str, hold_pairs: bool
) -> None:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    codes, scale = int8.quantize_weight(w, axis, estimate, hold_pairs)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= 127
    assert bool((scale > 0).all())
    value = codes.double() * int8.along(scale, axis, 2).double()
    inside = value.abs() < 126 * int8.along(scale, axis, 2)
    if not hold_pairs and estimate == "min_max":
        # Half a step for what is not clipped.
        bound = int8.along(scale, axis, 2).double() / 2 * (1 + 1e-5)
        assert bool(((value - w).abs() <= bound)[inside].all())


def test_per_channel_min_max_by_hand() -> None:
    w = torch.tensor([[1.27, -0.64, 0.004], [0.0, 0.0, 0.0]])
    codes, scale = int8.quantize_weight(w, 0)
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.01, 1.0])


def test_pairs_never_overflow_sixteen_bits_and_cost_little() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    free, free_scale = int8.quantize_weight(w, 0)
    held, scale = int8.quantize_weight(w, 0, hold_pairs=True)
    pairs = held.to(torch.int32).reshape(64, 48, 2)
    same_sign = pairs[..., 0] * pairs[..., 1] > 0
    largest = int((pairs.abs().sum(-1) * same_sign).max())
    assert 255 * largest < 2**15
    free_pairs = free.to(torch.int32).reshape(64, 48, 2)
    assert int((free_pairs.abs().sum(-1) * (free_pairs.prod(-1) > 0)).max()) > 128
    error = (held * scale[:, None] - w).square().mean()
    # A scale up to twice as wide for some channels: less than one bit, which would be 4.
    assert float(error) < 2.5 * float((free * free_scale[:, None] - w).square().mean())


def sums(codes: torch.Tensor) -> torch.Tensor:
    """Of neighbours of one sign in the order in which the runtime sums."""
    rows = codes.movedim(1, -1).reshape(len(codes), -1).to(torch.int32)
    even = rows.shape[1] // 2 * 2
    pairs = rows[:, :even].reshape(len(codes), -1, 2)
    return pairs.abs().sum(-1) * (pairs.prod(-1) > 0)


@pytest.mark.parametrize("shape", [(32, 8, 3, 3), (32, 3, 3, 3), (16, 5, 7), (8, 4, 3, 3, 3)])
@pytest.mark.parametrize("estimate", ["min_max", "mse"])
def test_pairs_of_a_convolution_are_channels_of_one_place(
    shape: tuple[int, ...], estimate: str
) -> None:
    w = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.4
    free, free_scale = int8.quantize_weight(w, 0, estimate)
    held, scale = int8.quantize_weight(w, 0, estimate, hold_pairs=True)
    assert int(sums(free).max()) > 128 >= int(sums(held).max())
    errors = [
        float((codes * int8.along(s, 0, w.dim()) - w).square().mean())
        for codes, s in ((free, free_scale), (held, scale))
    ]
    # Weights that fill their range evenly are the worst case: one bit, a factor of 4.
    assert errors[0] < errors[1] < 4.2 * errors[0]


@pytest.mark.parametrize(("width", "slack"), [(200, 1e-5), (576, 0.15)])
def test_scales_where_pairs_overflow_are_searched(width: int, slack: float) -> None:
    w = torch.randn(24, width, generator=torch.Generator().manual_seed(3))
    held, scale = int8.quantize_weight(w, 0, hold_pairs=True)
    _, base = int8.quantize_weight(w, 0)
    found = (held * scale[:, None] - w).square().sum(1)
    best = torch.full_like(found, float("inf"))
    for multiple in torch.linspace(1, 2, 17):
        step = (base * multiple)[:, None]
        codes = torch.round(w / step).clamp(-127, 127).reshape(24, -1, 2)
        # By hand: both halves of a pair of one sign give way alike, the first one first.
        excess = (codes.sum(-1).abs() - 128).clamp(min=0)
        cut = torch.stack([(excess / 2).ceil(), (excess / 2).floor()], -1)
        value = (codes - codes.sign() * cut).reshape(24, -1) * step
        best = torch.minimum(best, (value - w).square().sum(1))
    assert bool((found < best * (1 + slack)).all())


def test_a_searched_scale_is_never_worse() -> None:
    # One value a little beyond four thousand others: clipping it pays.
    w = torch.rand(4, 4000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    w[:, 7] = 1.02

    def error(estimate: str) -> torch.Tensor:
        codes, scale = int8.quantize_weight(w, 0, estimate)
        return (codes * scale[:, None] - w).square().sum(1)

    assert bool((error("mse") <= error("min_max") * (1 + 1e-6)).all())
    assert float(error("mse").sum()) < float(error("min_max").sum())


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [(0.0, 2.55, 0.01, 0), (-1.0, 1.55, 0.01, 100), (0.5, 2.55, 0.01, 0), (-2.55, -1.0, 0.01, 255),
     (0.0, 0.0, 1.0, 0)],
)  # fmt: skip
def test_activation_parameters_by_hand(low: float, high: float, scale: float, zero: int) -> None:
    found = int8.activation_parameters(low, high)
    assert found[0] == pytest.approx(scale, rel=1e-6)
    assert found[1] == zero


def test_smoothing_follows_equation_4() -> None:
    low, high = torch.tensor([-4.0, -0.5]), torch.tensor([1.0, 0.25])
    weight = torch.tensor([0.25, 1.0])
    factors = int8.smoothing(low, high, weight, 0.5)
    assert factors.tolist() == pytest.approx([4.0, 0.5**0.5])
