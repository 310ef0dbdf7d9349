"""SparseGPT of one matrix against optimal brain surgery in float64."""

import pytest
import torch

from graphwright.ir.calibration.hessian import inverse_factor
from graphwright.passes.prune._masks.patterns import Pattern
from graphwright.passes.prune._math.sparsegpt import prune_matrix, score


def problem(rows=6, columns=48, samples=200, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(samples, columns, generator=generator, dtype=dtype) @ mix + 0.3
    w = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return w, x, x.T @ x / samples


def factor(h):
    return inverse_factor(h, 0.01)[0]


def surgery(w, h, pattern, block, damping=0.01):
    """Algorithm 1 of the paper, literally: an explicit inverse, shrunk by elimination."""
    w, columns = w.clone(), w.shape[1]
    h = h + damping * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    inverse = torch.linalg.inv(h)
    cost_of = []  # [H_{j:, j:}^-1]_jj, the inverse that is left when columns before j are fixed
    left = inverse.clone()
    steps = []
    for _ in range(columns):
        cost_of.append(left[0, 0].clone())
        steps.append(left[0].clone())
        left = left[1:, 1:] - torch.outer(left[1:, 0], left[0, 1:]) / left[0, 0]
    keep = torch.ones_like(w, dtype=torch.bool)
    for j in range(columns):
        width = pattern.m or block
        if j % width == 0:
            part = w[:, j : j + width]
            costs = part.square() / torch.stack(cost_of[j : j + width])
            if pattern.m:
                for r in range(len(w)):
                    order = costs[r].argsort()
                    keep[r, j + order[: pattern.m - pattern.n]] = False
            else:
                count = pattern.count((j + part.shape[1]) * len(w)) - pattern.count(j * len(w))
                for at in costs.flatten().argsort()[:count].tolist():
                    keep[at // part.shape[1], j + at % part.shape[1]] = False
        for r in range(len(w)):
            if not keep[r, j]:
                w[r, j:] -= w[r, j].clone() / cost_of[j] * steps[j]
                w[r, j] = 0.0
    return w, keep


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:3"])
def test_equals_the_algorithm_with_explicit_inverses(pattern):
    w, _, h = problem()
    wanted = Pattern.parse(pattern, 0.6 if pattern == "unstructured" else None)
    expected, mask = surgery(w, h, wanted, block=16)
    actual, keep = prune_matrix(w, factor(h), wanted, block=16)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert bool((actual[~keep] == 0).all())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_lazy_blocks_equal_updates_at_once(pattern):
    w, _, h = problem(columns=64)
    wanted = Pattern.parse(pattern, None)
    keep = wanted.keep(score(w, factor(h)))
    one, _ = prune_matrix(w, factor(h), wanted, keep=keep, block=1)
    many, _ = prune_matrix(w, factor(h), wanted, keep=keep, block=24)
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-9)


def test_one_pruned_weight_is_the_optimal_brain_surgeon():
    w, _, h = problem(rows=1, columns=12)
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[0, 0] = False  # the first column: all others may make up for it
    actual, _ = prune_matrix(w, factor(h), Pattern(0.5), keep=keep)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=h.dtype)
    inverse = torch.linalg.inv(damped)
    expected = w - w[0, 0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    change = actual - w
    rise = (change @ damped @ change.T)[0, 0]
    assert rise == pytest.approx(float(w[0, 0] ** 2 / inverse[0, 0]), rel=1e-9)
    assert float(score(w, factor(h))[0, 0]) == pytest.approx(float(rise), rel=1e-9)


def test_best_reconstruction_of_the_last_columns_of_a_row():
    """With only the first columns pruned, the update is the least-squares solution."""
    w, x, h = problem(rows=2, columns=10)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[:, :4] = False
    upper, _ = inverse_factor(h, 0.0)
    actual, _ = prune_matrix(w, upper, Pattern(0.5), keep=keep)
    best = torch.linalg.lstsq(x[:, 4:], x @ w.T).solution.T
    torch.testing.assert_close(actual[:, 4:], best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_layer_error_is_below_that_of_magnitude_and_of_wanda(pattern):
    for seed in range(5):
        w, x, h = problem(rows=16, seed=seed)
        wanted = Pattern.parse(pattern, None)

        def error(new, w=w, x=x):
            return float((x @ (w - new).T).square().sum())

        ours = error(prune_matrix(w, factor(h), wanted, block=16)[0])
        magnitude = error(w.where(wanted.keep(w.abs()), 0.0))
        wanda = error(w.where(wanted.keep(w.abs() * x.square().mean(0).sqrt()), 0.0))
        assert ours < 0.9 * min(magnitude, wanda)


def test_the_number_of_zeros_is_exact_whatever_the_blocks():
    w, _, h = problem(rows=7, columns=50)
    for block in (1, 7, 128):
        _, keep = prune_matrix(w, factor(h), Pattern(0.37), block=block)
        assert int((~keep).sum()) == int(350 * 0.37)


def test_weights_of_dead_inputs_go_first():
    w, x, _ = problem(rows=4, columns=16)
    x[:, 3] = 0
    h = x.T @ x / len(x)
    actual, keep = prune_matrix(w, factor(h), Pattern(0.25), dead=h.diagonal() == 0)
    assert not bool(keep[:, 3].any())
    assert bool(torch.isfinite(actual).all())


def test_an_input_without_correlations_moves_no_weight():
    w = torch.randn(3, 20, dtype=torch.float64)
    h = torch.eye(20, dtype=torch.float64) * torch.rand(20, dtype=torch.float64)
    actual, keep = prune_matrix(w, factor(h), Pattern(0.5))
    assert torch.equal(actual, w.where(keep, 0.0))
