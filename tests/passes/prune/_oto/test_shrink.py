"""The sparse optimizers' arithmetic: HESSO, HESSO-CRIC and DHSPG against slow, obvious versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune import Otov2
from graphwright.passes.prune._oto.cric import HessoCric, probe_steps
from graphwright.passes.prune._oto.dhspg import Dhspg, interval, penalties, saliency
from graphwright.passes.prune._oto.hesso import Hesso, decay, targets_of_periods
from graphwright.passes.prune._oto.options import OtoSettings, settings
from graphwright.passes.prune._oto.shrink import Shrink
from graphwright.passes.prune._oto.training import find_units, learning_rates, make_shrink


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


class Loop:
    """A training loop of a network of its own, in float64."""

    def __init__(self, total: int | None, make: Any = torch.optim.SGD, **options: Any) -> None:
        self.model = mlp().double()
        program = gw.trace(self.model.eval(), (torch.randn(4, 6, dtype=torch.float64),))
        self.x = dict(self.model.named_parameters())
        extra = {"momentum": 0.9} if make is torch.optim.SGD else {}
        self.optimizer = make(self.x.values(), lr=0.05, **extra)
        self.units, _ = find_units(program, Otov2(**options).options, self.x)
        self.shrink: Shrink = make_shrink(
            self.units, Otov2(**options).options, total, self.optimizer
        )
        self.losses: list[float] = []
        self.step = 0

    def loss(self) -> Tensor:
        """On a batch of the step's own; which of three inputs is the largest is to be learnt."""
        g = torch.Generator().manual_seed(self.step)
        x = torch.randn(32, 6, generator=g, dtype=torch.float64)
        return nn.functional.cross_entropy(self.model(x), x[:, :3].argmax(1))

    def run(self, steps: int, each: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.losses.append(float(loss.detach()))
            with torch.no_grad():
                self.shrink.before(self.step, self.x, self.losses[-1])
                self.optimizer.step()
                rates = learning_rates(self.optimizer, self.x)
                self.shrink.after(self.step, self.x, rates)
            self.step += 1
            each()

    def zeros(self) -> list[bool]:
        """Per unit, read off the layers by hand."""
        found = []
        for number in (0, 2):
            w, b = self.x[f"{number}.weight"], self.x[f"{number}.bias"]
            found += [not w[i].any() and not b[i].any() for i in range(len(b))]
        return [bool(flag) for flag in found]


def test_decay_ends_at_exactly_zero() -> None:
    value = torch.tensor(0.7)
    halfway = 0.0
    for step in range(40):
        value = value * decay(step, 40)
        halfway = float(value) if step == 19 else halfway
    assert float(value) == 0.0
    assert halfway == pytest.approx(0.35, rel=1e-5)  # the factors' product falls on a line


def test_periods_share_the_units_and_the_last_takes_the_rest() -> None:
    assert targets_of_periods(10, 3) == [3, 6, 10]
    assert targets_of_periods(7, 1) == [7]


@pytest.mark.parametrize("periods", [1, 3])
def test_hesso_leaves_exactly_the_wanted_number_at_zero(periods: int) -> None:
    """floor(0.6 * 21) = 12; under momentum and further steps they stay."""
    loop = Loop(40, sparsity=0.6, start_pruning_step=4, pruning_steps=12, pruning_periods=periods)
    counts: list[int] = []
    loop.run(40, lambda: counts.append(sum(loop.zeros())))
    assert counts[3] == 0
    assert counts[16 - 1] == 12
    assert counts[-1] == 12
    assert loop.zeros() == loop.shrink.pruned.tolist()
    if periods == 3:
        assert [counts[3 + 4 * n] for n in (1, 2, 3)] == [4, 8, 12]
    assert loop.losses[-1] < loop.losses[0]


def test_hesso_picks_the_lowest_scores_of_the_step() -> None:
    """Against the five criteria written out, with d read off the optimizer's momentum."""
    loop = Loop(20, sparsity=0.5, start_pruning_step=3, pruning_steps=10)
    loop.run(3)
    before = {n: p.detach().clone() for n, p in loop.x.items()}
    loop.run(1)
    d = {n: loop.optimizer.state[p]["momentum_buffer"] for n, p in loop.x.items()}
    rows: list[list[float]] = []
    for number in (0, 2):
        for i in range(len(before[f"{number}.bias"])):
            names = (f"{number}.weight", f"{number}.bias")
            x = torch.cat([before[n][i].ravel() for n in names])
            g = torch.cat([d[n][i].ravel() for n in names])
            norm, dot = float(x.norm()), float(x @ g)
            cosine = 1 - dot / (norm * float(g.norm()))
            rows.append([norm, norm / (len(x) + 1e-6), cosine, abs(dot), 0.5 * dot**2])
    table = np.array(rows)
    total = (0.2 * table / np.linalg.norm(table, axis=0)).sum(1)
    expected = set(np.argsort(total)[:10].tolist())
    assert set(loop.shrink.redundant.nonzero().ravel().tolist()) == expected


def test_a_group_keeps_a_multiple() -> None:
    loop = Loop(20, sparsity=0.6, start_pruning_step=0, pruning_steps=10, group_divisible=4)
    loop.run(20)
    zeros = loop.zeros()
    kept = [12 - sum(zeros[:12]), 9 - sum(zeros[12:])]
    assert all(k % 4 == 0 and k for k in kept if k not in (12, 9))
    assert abs(sum(zeros) - 12) <= 4


# ---- DHSPG


def plan(**changes: Any) -> OtoSettings:
    found = settings(Otov2(method="dhspg", **changes).options, 100, 0, "sgd")
    assert found.start == 10
    return found


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("amplify", [1.0, 2.0, 20.0])
def test_lambda_shrinks_the_unit_and_keeps_a_descent_direction(
    penalty: float, amplify: float
) -> None:
    """Wherever the step would grow a unit, lambda lies inside (lo, hi), which means both."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(400, 7, dtype=torch.float64, generator=g)
    d = torch.randn(400, 7, dtype=torch.float64, generator=g) * 0.3
    xx, xd, dd = x.square().sum(1), (x * d).sum(1), d.square().sum(1)
    lam = penalties(xx, xd, dd, plan(penalty=penalty, amplify=amplify, hat_coefficient=10.0))
    grows = xd < 0
    lo, hi = interval(xx, xd, dd)
    assert bool(((lo < lam) & (lam < hi))[grows].all())
    assert bool((lam[~grows] == penalty).all())
    moved = d + lam[:, None] * x / x.norm(dim=1, keepdim=True)
    assert bool(((x * moved).sum(1) > 0)[grows].all())  # ||x|| shrinks for a small enough step
    assert bool(((d * moved).sum(1) > 0)[grows].all())  # and it still descends


def test_lambda_of_zero_units_is_finite() -> None:
    none = torch.zeros(3, dtype=torch.float64)
    assert penalties(none, none, none + 1, plan()).tolist() == [1e-3] * 3


def test_saliency_is_high_where_descent_shrinks_a_small_unit() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.3, 0.0]], dtype=torch.float64)
    parts = [(a * b).sum(1).numpy() for a, b in ((x, x), (x, g), (g, g))]
    found = saliency(*parts, np.full(3, 2.0))
    assert found.argsort().tolist() == [1, 0, 2]
    small = 1 / (np.array([1.0, 1.0, 0.1]) / 2 + 1e-6)
    cosine = np.array([1.0, -1.0, 1.0])
    expected = 0.5 * cosine / np.sqrt(3) + 0.5 * small / np.linalg.norm(small)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dhspg_steps_as_a_loop_over_units() -> None:
    """One step against the paper's lines, unit by unit."""
    loop = Loop(20, method="dhspg", sparsity=0.5, tolerance=0.1, start_pruning_step=3,
                epsilon=0.9, penalty=0.5, amplify=2.0, hat_coefficient=4.0)  # fmt: skip
    loop.run(3)
    before = {n: p.detach().clone() for n, p in loop.x.items()}
    loop.run(1)
    d = {n: loop.optimizer.state[p]["momentum_buffer"] for n, p in loop.x.items()}
    chosen = (loop.shrink.redundant | loop.shrink.pruned).tolist()
    assert sum(chosen) == int(21 * 0.6)
    unit, projected = 0, 0
    for number in (0, 2):
        names = (f"{number}.weight", f"{number}.bias")
        for i in range(len(before[names[1]])):
            x = torch.cat([before[n][i].ravel() for n in names])
            g = torch.cat([d[n][i].ravel() for n in names])
            expected = x - 0.05 * g
            if chosen[unit]:
                lam, dot = 0.5, float(x @ g)
                if dot < 0:
                    lo, hi = -dot / float(x.norm()), -float(g @ g) * float(x.norm()) / dot
                    lam = min(max(2.0 * lo, 0.5), 2.0)
                    lam = lam if lo < lam < hi else (lo + hi) / 2
                expected = x - 0.05 * (g + lam * x / x.norm())
                if float(expected @ x) < 0.9 * float(x @ x):
                    expected, projected = torch.zeros_like(x), projected + 1
            now = torch.cat([loop.x[n].detach()[i].ravel() for n in names])
            # a zero unit's readers are zero too, and d does not know of it
            read = (now == 0) & bool(expected.any())
            torch.testing.assert_close(torch.where(read, expected, now), expected,
                                       rtol=1e-9, atol=1e-9)  # fmt: skip
            unit += 1
    assert projected == int(loop.shrink.pruned.sum())


def test_dhspg_reaches_its_target_and_stops_there() -> None:
    loop = Loop(300, method="dhspg", sparsity=0.5, penalty=1.0, epsilon=0.9, start_pruning_step=5)
    loop.run(300)
    assert isinstance(loop.shrink, Dhspg)
    assert loop.shrink.done
    zero = sum(loop.zeros())
    assert 10 <= zero <= int(21 * 0.55)
    norms = loop.units.sums((loop.x, loop.x))[0]
    loop.run(60)
    assert sum(loop.zeros()) == zero
    assert bool((loop.units.sums((loop.x, loop.x))[0] >= 0.5 * norms).all())


# ---- HESSO-CRIC


CRIC = {"method": "hesso_cric", "sparsity": 0.5, "start_pruning_step": 30, "pruning_steps": 10,
        "sampling_steps": 5, "max_cycles": 4}  # fmt: skip


def test_probing_sees_the_loss_without_a_share_of_a_group_and_takes_everything_back() -> None:
    loop = Loop(120, **CRIC)
    loop.run(30)
    start = {n: p.detach().clone() for n, p in loop.x.items()}
    shrink = loop.shrink
    assert isinstance(shrink, HessoCric)
    gone: list[list[bool]] = []
    loop.run(12, lambda: gone.append(loop.zeros()))
    counts = [(sum(flags[:12]), sum(flags[12:])) for flags in gone]
    assert counts[::2] == [(3, 0), (6, 0), (9, 0), (0, 2), (0, 4), (0, 6)]
    assert counts[1::2] == [(0, 0)] * 6
    assert all(torch.equal(loop.x[n], value) for n, value in start.items())
    seen = [loss / loop.losses[30] for loss in loop.losses[31:42:2]]
    assert shrink.losses == [pytest.approx(seen[:3]), pytest.approx(seen[3:])]
    assert seen[2] > 1.0  # nine of twelve units are missed


def test_cycles_try_new_units_from_the_same_weights_until_nobody_is_new() -> None:
    loop = Loop(120, **CRIC)
    loop.run(30)
    start = {n: p.detach().clone() for n, p in loop.x.items()}
    shrink = loop.shrink
    assert isinstance(shrink, HessoCric)
    loop.run(probe_steps(2))
    tried: list[Tensor] = []

    def look() -> None:
        if shrink.decided_at == loop.step - 1:  # everything is taken back
            assert torch.equal(loop.x["4.weight"], start["4.weight"])
        k = loop.step - 1 - 30 - probe_steps(2)
        if shrink.decided_at < 0 and k % 5 == 0:
            tried.append(shrink.violating.clone())
        if shrink.decided_at < 0 and k % 5 == 4:
            assert loop.units.zeros(loop.x).tolist() == shrink.violating.tolist()

    loop.run(60, look)
    assert int(tried[0].sum()) == 10
    assert int(torch.stack(tried).sum(0).max()) == 1  # nobody is tried twice
    assert len(tried) <= 4
    assert shrink.decided_at == 30 + 12 + 5 * len(tried)
    assert sum(loop.zeros()) == 10


def test_final_scores_add_the_loss_of_the_group_over_its_units() -> None:
    loop = Loop(120, **CRIC)
    shrink = loop.shrink
    assert isinstance(shrink, HessoCric)
    shrink.total, shrink.samples = np.arange(21.0), 2
    shrink.losses = [[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]]
    expected = np.arange(21.0) / 2
    expected[:12] += 4.0 / 12
    expected[12:] += 1.0 / 9
    np.testing.assert_allclose(shrink.final_scores(), expected)


# ---- all three


@pytest.mark.parametrize("kind", ["hesso", "hesso_cric", "dhspg"])
def test_a_run_that_stops_and_goes_on_ends_in_the_same_bits(kind: str) -> None:
    options: dict[str, Any] = {"method": kind, "sparsity": 0.5, "start_pruning_step": 2}
    if kind == "hesso_cric":
        options = CRIC
    if kind == "dhspg":
        options |= {"penalty": 0.5, "epsilon": 0.5}
    straight = Loop(100, **options)
    straight.run(100)
    for stop in (35, 50, 70):
        first, second = Loop(100, **options), Loop(100, **options)
        first.run(stop)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.shrink.load_state_dict(first.shrink.state_dict())
        second.step = stop
        second.run(100 - stop)
        for name, value in straight.x.items():
            assert torch.equal(second.x[name], value), (stop, name)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_defaults_follow_the_rule_of_the_update(make: Any) -> None:
    found = Loop(100, make, method="dhspg").shrink.settings
    expected = (1e-3, 2.0, 10.0) if make is torch.optim.SGD else (1e-2, 20.0, 1e3)
    assert (found.penalty, found.amplify, found.hat_coefficient) == expected


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"more than the 20 of the run"):
        Loop(20, start_pruning_step=15, pruning_steps=10)
    with pytest.raises(ArgumentError, match=r"Give total_steps or start_pruning_step"):
        Loop(None)
    with pytest.raises(ArgumentError, match=r"0\.95 cannot be reached: 0\.619 is the most"):
        Loop(20, sparsity=0.95, group_divisible=4)
    with pytest.raises(ArgumentError, match=r"epsilon has no part in method hesso"):
        Otov2(epsilon=0.5)
    with pytest.raises(ArgumentError, match=r"cannot be cut into 5"):
        Otov2(pruning_steps=4, pruning_periods=5)
    with pytest.raises(ArgumentError, match="patience could end"):
        Otov2(tune={"hold_out": 0.1, "patience": 2})
    loop = Loop(20, start_pruning_step=0, pruning_steps=5)
    with torch.no_grad():
        loop.x["0.weight"][0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="no finite number"):
        loop.run(1)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    loop = Loop(20, method="dhspg", start_pruning_step=0)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    before = {n: p.detach().clone() for n, p in loop.x.items()}
    loop.run(3)
    assert all(torch.equal(before[n], p) for n, p in loop.x.items())
    assert isinstance(loop.shrink, Shrink)
    assert not isinstance(loop.shrink, Hesso)
