from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.every_pass import TUNE
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import Hook, Moment, TuneOptions, tune
from graphwright.passes.prune._masks.soft_shrinkage import SoftShrinkage
from graphwright.passes.prune._math.smallest import below_sampled, count_of, smallest
from graphwright.passes.prune.issp import Issp

CHAIN = ("text", [("prune.issp", {"sparsity": 0.5, "tune": TUNE})])

# ---- the set


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    share=st.floats(0.0, 1.0),
)
def test_exactly_so_many_of_the_smallest(values: list[int], share: float) -> None:
    """Against sorting in Python; few different values, so that ties are common."""
    weight = torch.tensor(values, dtype=torch.float64)
    count = count_of(share, len(values))
    assert count == min(math.ceil(share * len(values)), int(0.995 * len(values)))
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    expected = sorted(order[:count])
    assert smallest(weight, count).nonzero().flatten().tolist() == expected


def test_never_more_than_the_cap() -> None:
    assert count_of(0.9, 1000) == 900
    assert count_of(0.9001, 1000) == 901
    assert count_of(0.999, 1000) == 995
    assert count_of(0.5, 1) == 0


def test_a_sample_gives_the_threshold() -> None:
    """With the whole layer as the sample it is the exact set; with a part, near it."""
    weight = torch.randn(100, 100, dtype=torch.float64)
    exact = smallest(weight, 9000)
    assert torch.equal(below_sampled(weight, 0.9, torch.randperm(10_000)), exact)
    estimated = below_sampled(weight, 0.9, torch.randperm(10_000)[:2000])
    share = estimated.double().mean().item()
    assert abs(share - 0.9) < 5 * math.sqrt(0.9 * 0.1 / 2000)  # five standard deviations
    nested = (exact & ~estimated).sum() * (estimated & ~exact).sum()
    assert nested == 0, "both are everything below some threshold"


# ---- the step


class Line(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.fixture
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Line(torch.float64).eval(), (torch.randn(4, 10, dtype=torch.float64),))


def data(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, 10, generator=generator, dtype=torch.float64)
    return [(part, part @ torch.ones(10, 8, dtype=torch.float64)) for part in x]


class Before(Hook):
    """The weights as the plain optimizer step leaves them: it is called ahead of the shrinkage."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def after_step(self, at: Moment) -> None:
        self.weights.append(at.parameters["fc.weight"].detach().clone())


class After(Before):
    """The same, called behind it."""


def shrinkage(rho: float, share: float, count: int = 72) -> SoftShrinkage:
    return SoftShrinkage(["fc.weight"], lambda name, w, step: smallest(w, count), rho, share)


PLAIN = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "loss": "mse"}


def test_one_step_is_the_formula(program: gw.Program) -> None:
    """w = rho w for the 90% smallest |w|, and the others bit for bit what the optimizer made."""
    before, after, hook = Before(), After(), shrinkage(0.95, 1.0)
    tune(program, data(), TuneOptions(steps=4, **PLAIN), Context(), hooks=[before, hook, after])
    for plain, shrunk in list(zip(before.weights, after.weights, strict=True))[:-1]:
        flat = plain.flatten()
        chosen = flat.abs().argsort()[:72]
        expected = flat.clone()
        expected[chosen] = flat[chosen] * 0.95
        assert torch.equal(shrunk.flatten(), expected)


def test_without_gradients_the_smallest_fall_geometrically(program: gw.Program) -> None:
    """A weight that is k steps in the set is w0 rho^k."""
    after = After()

    class NoGradient(Hook):
        def after_backward(self, at: Moment) -> None:
            at.parameters["fc.weight"].grad.zero_()

    options = TuneOptions(steps=9, optimizer="sgd", loss="mse", momentum=0.0)
    hooks = [NoGradient(), shrinkage(0.95, 1.0), after]
    tune(program, data(), options, Context(), hooks=hooks)
    first = program.state["fc.weight"].detach().flatten()
    chosen = first.abs().argsort()[:72]
    for k, weight in enumerate(after.weights[:8], start=1):
        expected = first.clone()
        expected[chosen] *= 0.95**k
        torch.testing.assert_close(weight.flatten(), expected, rtol=1e-13, atol=0)
    last = after.weights[8].flatten()
    assert bool((last[chosen] == 0).all()), "frozen at the end"


def test_the_set_changes_and_then_is_frozen(program: gw.Program) -> None:
    """10 of 20 steps and one more choose anew; then the zeros stay where they are."""
    after, hook = After(), shrinkage(0.95, 0.5)
    options = TuneOptions(steps=20, **PLAIN)
    tuned = tune(program, data(), options, Context(), hooks=[hook, after])
    zeros = [weight == 0 for weight in after.weights]
    assert [int(z.sum()) for z in zeros] == [0] * 10 + [72] * 10
    assert all(torch.equal(z, zeros[-1]) for z in zeros[10:])
    assert hook.left > 0, "some weight recovered"
    assert hook.selections == 10
    moved = (after.weights[10] != after.weights[-1]) & ~zeros[-1]
    assert bool(moved.any()), "the others train on"
    assert torch.equal(tuned.program.state["fc.weight"].detach(), after.weights[-1])


# ---- the pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        return nn.functional.pixel_shuffle(self.tail(torch.relu(self.body(h)) + h), 2)


@pytest.fixture
def net() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), (torch.randn(4, 1, 6, 6),), {"x": {0: "batch"}})


@pytest.fixture(scope="module")
def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    big = torch.rand(24, 1, 12, 12, generator=generator)
    big = nn.functional.avg_pool2d(big, 3, 1, 1)
    return [(nn.functional.avg_pool2d(part, 2), part) for part in big.split(4)]


TUNE = {"steps": 24, "optimizer": "adam", "lr": 5e-3, "loss": "mse"}


@pytest.mark.parametrize("rho", [0.95, 0.0])
def test_ends_at_the_exact_sparsity(net: gw.Program, images, rho: float) -> None:
    """Soft shrinkage, and hard thresholding (rho 0)."""
    before = {name: tensor.clone() for name, tensor in net.state.items()}
    step = Issp(sparsity=0.9, rho=rho, targets=["*", "!tail"], tune=TUNE)
    result = step.execute(net, Context(training=images))
    zeros = {n: int((t == 0).sum()) for n, t in result.program.state.items()}
    assert zeros == {
        "conv.weight": math.ceil(0.9 * 72), "conv.bias": 0, "body.weight": math.ceil(0.9 * 576),
        "body.bias": 0, "tail.weight": 0, "tail.bias": 0,
    }  # fmt: skip
    what = {action.layer: action.what for action in result.actions}
    assert what == {"conv": "65 of 72 weights pruned", "body": "519 of 576 weights pruned"}
    assert result.metrics["sparsity"] == 584 / 648
    assert (result.metrics["churn"] > 0) == (rho > 0), "what is set to zero hardly comes back"
    assert result.metrics["steps"] == 24
    assert all(torch.equal(tensor, net.state[name]) for name, tensor in before.items())
    for name in ("conv.bias", "body.bias", "tail.weight"):
        assert not torch.equal(result.program.state[name], net.state[name]), "all others train"


def test_a_pattern_prunes_n_of_every_m(net: gw.Program, images) -> None:
    result = Issp(pattern=[7, 8], tune=TUNE).execute(net, Context(training=images))
    for name in ("conv.weight", "body.weight", "tail.weight"):
        groups = result.program.state[name].detach().reshape(-1, 8)
        assert ((groups == 0).sum(1) == 7).all(), name
    assert result.metrics["sparsity"] == 0.875


def test_patterns_that_do_not_divide(net: gw.Program, images) -> None:
    context = Context(training=images)
    result = Issp(pattern=[9, 16], tune=TUNE).execute(net, context)
    reasons = {action.layer: action.reason for action in result.actions}
    assert reasons == {"conv": "its 72 weights do not divide by 16", "body": "", "tail": ""}
    # 72, 576 and 288 are multiples of 72: from 9:16 on, 11:18 is the first that fits
    adjusted = Issp(pattern=[9, 16], allow_adjust=True, tune=TUNE).execute(net, context)
    groups = adjusted.program.state["conv.weight"].detach().reshape(-1, 18)
    assert ((groups == 0).sum(1) == 11).all()
    with pytest.raises(ModelError, match=r"conv: no selected layer.*72 weights do not divide by 7"):
        Issp(pattern=[6, 7], targets=["conv"], tune=TUNE).execute(net, context)
    with pytest.raises(ModelError, match=r"74:75 cannot be adjusted.*multiples of 72"):
        Issp(pattern=[74, 75], allow_adjust=True, tune=TUNE).execute(net, context)


def test_the_fast_variant_is_near_and_ends_exact(net: gw.Program, images) -> None:
    step = Issp(sparsity=0.9, sample=100, tune=TUNE)
    result = step.execute(net, Context(training=images))
    zeros = {n: int((t == 0).sum()) for n, t in result.program.state.items() if "weight" in n}
    assert zeros == {"conv.weight": 65, "body.weight": 519, "tail.weight": 260}
    again = step.execute(net, Context(training=images))
    exact = Issp(sparsity=0.9, tune=TUNE).execute(net, Context(training=images))
    for name in zeros:
        assert torch.equal(result.program.state[name], again.program.state[name])
    assert not torch.equal(
        result.program.state["body.weight"], exact.program.state["body.weight"]
    ), "thresholds are estimates"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.995}, "less than 0.995"),
        ({"rho": 1.0}, "less than 1"),
        ({"sparsity": 0.9, "pattern": [9, 10]}, "not both"),
        ({"pattern": [200, 201]}, "prunes 99.5% of the weights or more"),
        ({"pattern": [4, 4]}, "prunes"),
        ({"pattern": [9, 10], "sample": 100}, "sample belongs to sparsity"),
        ({"allow_adjust": True}, "allow_adjust belongs to pattern"),
    ],
)
def test_options_that_do_not_go_together(options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Issp(**options)


class Interrupt(SoftShrinkage):
    """Ends the run, as a kill would, before a step."""

    at_step = -1

    def before_step(self, at: Moment) -> None:
        if at.step == self.at_step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [6, 18])
def test_killed_and_started_again(
    net: gw.Program, images, tmp_path: Path, monkeypatch, stop: int
) -> None:
    """Stopped while the set still changes, or after it is frozen: the same bytes, and churn."""
    from graphwright.passes.prune import issp

    monkeypatch.setattr(issp, "SoftShrinkage", Interrupt)
    step = Issp(sparsity=0.9, sample=100, tune=TUNE)
    straight = step.execute(net, Context(training=images))
    context = Context(training=images, work=tmp_path, checkpoint_seconds=0.0)
    monkeypatch.setattr(Interrupt, "at_step", stop)
    with pytest.raises(KeyboardInterrupt):
        step.execute(net, context)
    monkeypatch.setattr(Interrupt, "at_step", -1)
    again = step.execute(net, context)
    assert again.metrics == straight.metrics
    for name, tensor in straight.program.state.items():
        assert torch.equal(again.program.state[name], tensor), name


def test_evaluations_see_the_zeros(net: gw.Program, images) -> None:
    """Also before the set is frozen, and the best of them is what comes out."""
    seen: list[int] = []

    def evaluate(current: gw.Program) -> float:
        seen.append(int((current.state["body.weight"] == 0).sum()))
        return float(len(seen))  # the first one is the best

    hook = SoftShrinkage(["body.weight"], lambda name, w, step: smallest(w, 519), 0.95, 0.5)
    options = TuneOptions(**TUNE, evaluate_every=4)
    tuned = tune(net, images, options, Context(), hooks=[hook], evaluate=evaluate)
    assert seen == [519] * 6
    assert tuned.history.best_step == 4
    mask = hook.masks(tuned.program.state)["body.weight"]
    assert int((~mask).sum()) == 519


def test_the_result_runs_in_onnxruntime(net: gw.Program, images) -> None:
    pruned = Issp(tune=TUNE)(net, training=images, check=False)
    x = images[0][0]
    torch.testing.assert_close(
        gw.lower(pruned, "onnxruntime")(x), pruned(x), rtol=1e-4, atol=1e-5
    )  # float32 sums
