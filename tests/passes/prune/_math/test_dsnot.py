"""DSnoT of one matrix against a loop over rows that is written from its description."""

import math

import pytest
import torch

from graphwright.passes.prune._masks.patterns import Pattern
from graphwright.passes.prune._math.dsnot import DsnotSettings, refine


def problem(rows=32, columns=64, samples=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(columns, generator=generator)
    spread = torch.rand(columns, generator=generator) + 0.1
    x = torch.randn(samples, columns, generator=generator) * spread + mean
    w = torch.randn(rows, columns, generator=generator)
    return w, x


def one_row(dense, current, keep, total, variance, metric, pattern, s):
    """The trades of one row, in Python floats."""
    columns = range(len(dense))
    c_grow = [float(dense[j] * total[j]) for j in columns]
    c_drop = [float(current[j] * total[j]) for j in columns]
    e = sum(float((dense[j] - current[j]) * total[j]) for j in columns)
    sign = math.copysign(1, e) if e else 0
    order = sorted(
        (j for j in columns if not keep[j]), key=lambda j: c_grow[j] / float(variance[j]) ** s.power
    )
    tops = [j for j in reversed(order) if c_grow[j] > 0]
    bottoms = [j for j in order if c_grow[j] < 0]
    droppable = sorted((j for j in columns if keep[j]), key=lambda j: float(metric[j]))
    kept = [bool(k) for k in keep]
    for _ in range(s.cycles):
        if abs(e) <= s.threshold:
            break
        ends = tops if e > 0 else bottoms
        if not ends:
            break
        grown = ends[0]
        if pattern.m:
            group = [j for j in droppable if j // pattern.m == grown // pattern.m]
        else:
            group = [j for j in droppable if (c_drop[j] < 0 if e >= 0 else c_drop[j] > 0)]
        if not group:
            break
        dropped = group[0]
        after = e - c_grow[grown] + c_drop[dropped]
        if (s.same_sign or pattern.m) and (math.copysign(1, after) if after else 0) != sign:
            break
        if s.never_worse and abs(after) > abs(e):
            break
        ends.remove(grown)
        droppable.remove(dropped)
        kept[grown], kept[dropped], e = True, False, after
    return kept, e


def run(pattern, settings, seed=0, sparsity=0.6, dtype=torch.float64):
    w, x = problem(seed=seed)
    w, x = w.to(dtype), x.to(dtype)
    metric = w.abs() * x.square().mean(0).sqrt()
    wanted = Pattern.parse(pattern, None if ":" in pattern else sparsity)
    keep = wanted.keep(metric)
    arguments = (w, w.where(keep, 0.0), keep, x.sum(0), x.var(0, unbiased=False), metric, wanted)
    return w, x, keep, arguments, refine(*arguments, settings)


@pytest.mark.parametrize("same_sign", [True, False])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:8"])
def test_equals_the_slow_loop(pattern, same_sign):
    for seed, settings in enumerate(
        [
            DsnotSettings(same_sign=same_sign),
            DsnotSettings(cycles=3, same_sign=same_sign),
            DsnotSettings(threshold=20.0, power=0.0, same_sign=same_sign),
            DsnotSettings(same_sign=same_sign, never_worse=True),
        ]
    ):
        _, _, keep, arguments, result = run(pattern, settings, seed)
        dense, current, _, total, variance, metric, wanted = arguments
        for r in range(len(dense)):
            mask, e = one_row(
                dense[r], current[r], keep[r], total, variance, metric[r], wanted, settings
            )
            assert result.keep[r].tolist() == mask
            assert float(result.after[r]) == pytest.approx(e, rel=1e-9, abs=1e-9)
        assert result.trades > 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_rows_keep_their_zeros_and_come_nearer_to_their_mean_output(pattern):
    settings = DsnotSettings(never_worse=True)  # under N:M the paper's own rule lets some grow
    w, x, keep, _, result = run(pattern, settings)
    assert torch.equal(result.keep.sum(1), keep.sum(1))
    wanted = Pattern.parse(pattern, 0.6 if pattern == "unstructured" else None)
    if wanted.m:
        groups = result.keep.reshape(len(w), -1, wanted.m)
        assert bool((groups.sum(2) == wanted.n).all())
    assert bool((result.after.abs() <= result.before.abs()).all())
    assert float(result.after.abs().mean()) < 0.9 * float(result.before.abs().mean())
    # what it says of e is what the masks give
    for mask, e in ((keep, result.before), (result.keep, result.after)):
        torch.testing.assert_close(((w - w.where(mask, 0.0)) * x.sum(0)).sum(1), e)


def test_the_papers_rule_trades_on_under_a_pattern():
    """Without ours a row goes through trades that take it farther, as the code does."""
    ours = run("2:4", DsnotSettings(never_worse=True))[4]
    paper = run("2:4", DsnotSettings())[4]
    assert paper.trades > ours.trades
    assert bool((ours.after.abs() <= ours.before.abs()).all())
    assert not bool((paper.after.abs() <= paper.before.abs()).all())


def test_the_sign_test_is_what_keeps_outputs_near():
    def error(w, x, keep):
        return float((x @ (w - w.where(keep, 0.0)).T).square().mean())

    plain = tested = untested = 0.0
    for seed in range(8):
        w, x, keep, _, result = run("unstructured", DsnotSettings(), seed)
        plain += error(w, x, keep)
        tested += error(w, x, result.keep)
        untested += error(w, x, run("unstructured", DsnotSettings(same_sign=False), seed)[4].keep)
    assert tested < plain < untested


def test_dead_and_constant_inputs_do_no_harm():
    w, x = problem()
    x[:, 5], x[:, 9] = 0.0, 2.0
    metric = w.abs() * x.square().mean(0).sqrt()
    keep = Pattern(0.5).keep(metric)
    variance = x.var(0, unbiased=False)
    variance[9] = 0.0
    result = refine(
        w, w.where(keep, 0.0), keep, x.sum(0), variance, metric, Pattern(0.5), DsnotSettings()
    )
    assert bool(torch.isfinite(result.after).all())
    assert torch.equal(result.keep[:, 5], keep[:, 5])  # it cannot change any output
    assert torch.equal(result.keep.sum(1), keep.sum(1))


def test_all_inputs_constant():
    w = torch.randn(4, 8)
    keep = Pattern(0.5).keep(w.abs())
    ones = torch.ones(8)
    result = refine(
        w, w.where(keep, 0.0), keep, ones, ones * 0, w.abs(), Pattern(0.5), DsnotSettings()
    )
    assert bool((result.after.abs() <= result.before.abs()).all())


def test_updated_weights_are_counted_by_their_own_values():
    """On weights that are not the dense ones, e is still the difference of mean outputs."""
    w, x = problem()
    keep = Pattern(0.5).keep(w.abs())
    current = (w * 1.1).where(keep, 0.0)
    result = refine(
        w, current, keep, x.sum(0), x.var(0), w.abs(), Pattern(0.5), DsnotSettings(threshold=1e-3)
    )
    new = torch.where(keep, current, w).where(result.keep, 0.0)
    torch.testing.assert_close(((w - new) * x.sum(0)).sum(1), result.after, rtol=1e-4, atol=1e-3)
