"""The recursion of GPTQ against slow float64 versions of the paper's formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphwright.ir.stored import grid as grid_math
from graphwright.passes.quantize._math.gptq import GptqSettings, round_matrix

DAMPING = 0.01


def damped(h: Tensor) -> Tensor:
    h = h.clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return h


def factor(h: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped H's inverse, by an explicit inverse."""
    return torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)


def problem(rows: int, columns: int, seed: int = 0, samples: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix and the H of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples or 3 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    return w, x.T @ x / len(x)


def nearest(w: Tensor, settings: GptqSettings) -> Tensor:
    """Codes of `w`, each weight by itself."""
    scale, zero = settings.fit(grid_math.grouped(w, settings.block))
    wide, middle = (grid_math.spread(v, settings.block, w.shape[1]) for v in (scale, zero))
    return grid_math.encode(w, wide, middle, settings.bits).to(torch.uint8)


def nearest_value(w: Tensor, settings: GptqSettings) -> Tensor:
    """`w` with each weight rounded by itself."""
    scale, zero = settings.fit(grid_math.grouped(w, settings.block))
    wide, middle = (grid_math.spread(v, settings.block, w.shape[1]) for v in (scale, zero))
    return grid_math.decode(nearest(w, settings).double(), wide, middle)


def naive(w: Tensor, h: Tensor, settings: GptqSettings, order: list[int]) -> tuple[Tensor, float]:
    """Optimal brain quantization in a fixed order: H's inverse is updated after every column."""
    w, inverse = w.clone(), torch.linalg.inv(damped(h))
    columns = w.shape[1]
    value, loss = torch.zeros_like(w), 0.0
    static = settings.fit(grid_math.grouped(w, settings.block))
    current: dict[int, tuple[Tensor, Tensor]] = {}
    left = list(order)
    for j in order:
        group = j // settings.block
        if settings.static:
            scale, zero = static[0][:, group], static[1][:, group]
        else:
            if j % settings.block == 0:
                current[group] = settings.fit(w[:, j : j + settings.block])
            scale, zero = current[group]
        value[:, j] = grid_math.decode(
            grid_math.encode(w[:, j], scale, zero, settings.bits), scale, zero
        )
        error = w[:, j] - value[:, j]
        loss += float((error**2).sum() / inverse[j, j] / 2)
        left.remove(j)
        w[:, left] -= torch.outer(error, inverse[j, left]) / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert not left
    assert columns == w.shape[1]
    return value, loss


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [4, 8, 16, 5, 100])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_optimal_brain_quantization_in_the_same_order(
    bits: int, block: int, symmetric: bool
) -> None:
    w, h = problem(7, 20)
    # A symmetric grid puts every group's extreme halfway between two codes; with scales of the
    # given weights both sides meet the same numbers there.
    settings = GptqSettings(bits, block, symmetric, static=symmetric)
    got = round_matrix(w, h, factor, settings)
    value, loss = naive(w, h, settings, list(range(20)))
    torch.testing.assert_close(got.value(block), value, rtol=1e-10, atol=1e-10)
    assert got.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("block", [48, 96, 192, 160])
def test_stretches_of_columns_change_nothing(block: int) -> None:
    """More columns than one stretch, groups that are shorter and longer than it."""
    w, h = problem(3, 300)
    settings = GptqSettings(3, block)
    value, _ = naive(w, h, settings, list(range(300)))
    torch.testing.assert_close(
        round_matrix(w, h, factor, settings).value(block), value, rtol=1e-8, atol=1e-8
    )


def test_act_order_with_static_groups_gives_codes_in_the_original_order() -> None:
    w, h = problem(6, 24)
    settings = GptqSettings(3, 8, static=True, order=True)
    got = round_matrix(w, h, factor, settings)
    order = torch.argsort(h.diagonal(), descending=True).tolist()
    assert order != sorted(order)
    value, _ = naive(w, h, settings, order)
    torch.testing.assert_close(got.value(8), value, rtol=1e-10, atol=1e-10)
    scale, zero = settings.fit(grid_math.grouped(w, 8))
    assert torch.equal(got.scale, scale)
    assert torch.equal(got.zero, zero)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_independent_inputs_make_it_rounding_to_nearest(block: int, symmetric: bool) -> None:
    w, _ = problem(9, 32)
    settings = GptqSettings(4, block, symmetric)
    got = round_matrix(w, torch.eye(32, dtype=w.dtype), factor, settings)
    assert torch.equal(got.codes, nearest(w, settings))
    codes = []
    for start in range(0, 32, block):
        part = w[:, start : start + block]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            reach = torch.maximum(high, -low)
            step, middle = 2 * reach / 15, torch.full_like(reach, 8)
        else:
            step = (high - low) / 15
            middle = torch.round(-low / step)
        codes.append(torch.clamp(torch.round(part / step[:, None]) + middle[:, None], 0, 15))
    assert torch.equal(got.codes, torch.cat(codes, 1).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lowers_the_error_of_the_outputs(bits: int) -> None:
    shares = []
    for seed in range(6):
        w, h = problem(16, 64, seed)
        settings = GptqSettings(bits, 16, static=True)
        errors = []
        ours = round_matrix(w, h, factor, settings).value(16)
        for value in (ours, nearest_value(w, settings)):
            change = w - value
            errors.append(float(torch.trace(change @ h @ change.T)))
        shares.append(errors[0] / errors[1])
    assert max(shares) < 0.8
    assert sum(shares) / len(shares) < 0.7


def test_loss_is_half_of_the_damped_error() -> None:
    w, h = problem(5, 40)
    for settings in (GptqSettings(3, 16), GptqSettings(2, 8, static=True, order=True)):
        got = round_matrix(w, h, factor, settings)
        change = w - got.value(settings.block)
        expected = float(torch.trace(change @ damped(h) @ change.T)) / 2
        assert got.loss == pytest.approx(expected, rel=1e-9)


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nothing() -> None:
    w, h = problem(4, 16)
    dead = [3, 11]
    h[dead] = 0
    h[:, dead] = 0
    settings = GptqSettings(4, 16, static=True)
    got = round_matrix(w, h, factor, settings)
    alone = nearest(w, settings)
    assert torch.equal(got.codes[:, dead], alone[:, dead])
    assert not torch.equal(got.codes, alone)


def test_zeros_stay_zero_when_asked() -> None:
    w, h = problem(8, 32)
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    plain, kept = (
        round_matrix(w, h, factor, GptqSettings(3, 8, keep_zeros=keep)).value(8)
        for keep in (False, True)
    )
    assert int((plain[w == 0] != 0).sum()) > 0
    assert int((kept[w == 0] != 0).sum()) == 0
    # What the zeros should have become is passed on: better than masking afterwards.
    masked = torch.where(w == 0, 0.0, plain)
    errors = [float(torch.trace((w - q) @ h @ (w - q).T)) for q in (kept, masked)]
    assert errors[0] < errors[1]


def test_search_finds_ranges_of_less_error() -> None:
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 3
    for symmetric in (False, True):
        settings = GptqSettings(3, 64, symmetric)
        plain, searched = (nearest_value(w, s) for s in (settings, replace(settings, search=True)))
        errors = [((q - w).abs() ** 2.4).sum(1) for q in (plain, searched)]
        assert bool((errors[1] <= errors[0]).all())
        assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


def test_the_search_is_the_best_of_all_ranges_it_names() -> None:
    w = torch.tensor([[5.0, -0.4, 0.3, 0.21, -0.33, 0.12, -0.04, 0.4]], dtype=torch.float64)
    best = (float("inf"), 0.0, 0.0)
    for step in range(80):
        share = 1 - step / 100
        low, high = -0.4 * share, 5.0 * share
        scale = (high - low) / 7
        zero = round(-low / scale)
        codes = [min(max(round(float(v) / scale) + zero, 0), 7) for v in w[0]]
        pairs = zip(codes, w[0].tolist(), strict=True)
        error = sum(abs((c - zero) * scale - v) ** 2.4 for c, v in pairs)
        best = min(best, (error, scale, zero))
    scale_, zero_ = grid_math.fit(w, 3, search=True)
    assert float(scale_) == pytest.approx(best[1])
    assert float(zero_) == best[2]


def test_a_group_of_zeros_is_exact() -> None:
    scale, zero = grid_math.fit(torch.zeros(2, 8), 4)
    assert bool((scale > 0).all())
    value = grid_math.decode(
        grid_math.encode(torch.zeros(2, 8), scale[:, None], zero[:, None], 4),
        scale[:, None],
        zero[:, None],
    )
    assert torch.equal(value, torch.zeros(2, 8))
