from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.every_pass import TUNE
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches, Rows
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import select
from graphwright.ir.tune import Hook, TuneOptions, tune
from graphwright.passes.prune._masks.nm_decay import (
    NmSchedule,
    densify,
    geometric,
    mask_value,
    stepwise,
)
from graphwright.passes.prune._masks.nm_mask import nm_mask
from graphwright.passes.prune._masks.nm_rows import nm_rows
from graphwright.passes.prune._masks.nm_training import NmTraining, masked
from graphwright.passes.prune.nm import Nm

CHAIN = ("text", [("prune.nm", {"tune": TUNE})])

# ---- masks


@given(
    groups=st.integers(1, 5),
    m=st.integers(1, 9),
    rows=st.integers(1, 4),
    data=st.data(),
)
def test_every_group_keeps_its_largest(groups: int, m: int, rows: int, data) -> None:
    """Against sorting each group in Python; few different values, so that ties are common."""
    n = data.draw(st.integers(0, m))
    values = st.lists(st.integers(0, 4), min_size=groups * m, max_size=groups * m)
    scores = torch.tensor([data.draw(values) for _ in range(rows)], dtype=torch.float64)
    mask = nm_mask(scores, n, m)
    assert mask.dtype == torch.bool
    for row in range(rows):
        for group in range(groups):
            part = scores[row, group * m : (group + 1) * m].tolist()
            order = sorted(range(m), key=lambda i: (-part[i], i))
            kept = mask[row, group * m : (group + 1) * m].nonzero().flatten().tolist()
            assert kept == sorted(order[:n])


def test_rows_that_do_not_divide_are_never_wrapped() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        nm_mask(torch.randn(4, 6), 2, 4)


class Kinds(nn.Module):
    """One layer of each kind that N:M masks know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, (2, 3), padding=(0, 1), groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.fc = nn.Linear(4, 8)
        self.plain = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.conv(x)).mean((2, 3))
        return self.fc(h) @ self.plain


def naive_mask(weight: Tensor, n: int, m: int, walk: list[list[tuple[int, ...]]]) -> Tensor:
    """Keeps the n largest of every m places of each walk."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for places in walk:
        for start in range(0, len(places), m):
            group = places[start : start + m]
            for place in sorted(group, key=lambda p: -abs(float(weight[p])))[:n]:
                mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("name", "along", "length", "walk"),
    [
        ("fc", "input", 4, lambda s: [[(o, i) for i in range(s[1])] for o in range(s[0])]),
        ("fc", "output", 8, lambda s: [[(o, i) for o in range(s[0])] for i in range(s[1])]),
        ("plain", "input", 8, lambda s: [[(i, o) for i in range(s[0])] for o in range(s[1])]),
        ("plain", "output", 4, lambda s: [[(i, o) for o in range(s[1])] for i in range(s[0])]),
        # a row of the unfolded product, input channels innermost
        ("conv", "input", 12, lambda s: [
            [(o, i, y, x) for y in range(s[2]) for x in range(s[3]) for i in range(s[1])]
            for o in range(s[0])
        ]),
        ("conv", "output", 4, lambda s: [
            [(g * 4 + o, i, y, x) for o in range(4)]
            for g in range(2) for i in range(s[1]) for y in range(s[2]) for x in range(s[3])
        ]),
        ("up", "input", 4, lambda s: [
            [(g * 4 + i, o, y, x) for i in range(4)]
            for g in range(2) for o in range(s[1]) for y in range(s[2]) for x in range(s[3])
        ]),
        ("up", "output", 2, lambda s: [
            [(i, o, y, x) for o in range(s[1])]
            for i in range(s[0]) for y in range(s[2]) for x in range(s[3])
        ]),
    ],
)  # fmt: skip
def test_groups_run_along_the_channels(name: str, along: str, length: int, walk) -> None:
    """Against loops over the places of each row, for all layouts of a weight."""
    program = gw.trace(Kinds().eval(), (torch.randn(2, 4, 5, 5),))
    (layer,) = select(program, [name])
    weight = program.state[layer.weight].detach()
    rows = nm_rows(layer, weight, along)
    assert rows.length == length
    m = 2 if length == 2 else 4
    expected = naive_mask(weight, 1, m, walk(weight.shape))
    assert torch.equal(rows.mask(weight, 1, m), expected)


# ---- schedules


def test_the_patterns_of_the_paper() -> None:
    assert stepwise(1, 16) == ((15, 16), (8, 16), (4, 16), (2, 16), (1, 16))
    assert stepwise(2, 4) == ((3, 4), (2, 4))
    assert stepwise(3, 12) == ((11, 12), (6, 12), (3, 12))
    assert geometric(1, 8, 8) == ((8, 64), (4, 32), (2, 16), (1, 8))
    assert geometric(1, 8, 16)[0] == (16, 128)
    assert densify(1, 8, 8) == ((1, 64), (1, 32), (1, 16), (1, 8))
    with pytest.raises(ValueError, match="power of two"):
        stepwise(2, 6)


def test_phases_and_frames_of_a_run() -> None:
    """100 steps: 10 dense, 70 in five equal frames, 20 under the final mask."""
    schedule = NmSchedule(stepwise(1, 16), "linear", 0.01, dense=0.1, finetune=0.2)
    stages = [schedule.at(step, 100) for step in range(100)]
    assert stages[:10] == [None] * 10
    assert [s.n for s in stages[10:80]] == [15] * 14 + [8] * 14 + [4] * 14 + [2] * 14 + [1] * 14
    values = [s.value for s in stages[10:80]]
    np.testing.assert_allclose(values, [1 - 0.01 * t for t in range(70)], atol=1e-12)  # float64
    assert values[0] == 1.0
    assert [(s.n, s.m, s.value) for s in stages[80:]] == [(1, 16, 0.0)] * 20
    assert schedule.value_at_end(100, 100) == pytest.approx(0.31)
    assert schedule.value_at_end(5, 100) == 1.0
    assert schedule.value_at_end(11, 100) == 1.0
    assert schedule.value_at_end(31, 100) == pytest.approx(0.8)


@pytest.mark.parametrize("total", [50, 1000])
def test_without_a_rate_the_decay_ends_with_the_run(total: int) -> None:
    """At every length the last masked step is a step before e^-10, or before 0."""
    masked = total - total // 5  # a tenth dense, a tenth under the final mask
    last = (masked - 1) / masked
    for decay, end in (("exponential", math.exp(-10 * last)), ("linear", 1 - last)):
        schedule = NmSchedule(((1, 4),), decay, dense=0.1, finetune=0.1)
        assert schedule.value_at_end(total, total) == pytest.approx(end)
        halfway = schedule.at(total // 10 + masked // 2, total)
        assert halfway is not None
        assert halfway.value == pytest.approx(math.exp(-5) if decay == "exponential" else 0.5)
    assert Nm().options.schedule().rate is None


def test_mask_values() -> None:
    assert mask_value("exponential", 1e-4, 0) == 1.0
    assert mask_value("exponential", 1e-4, 30_000) == pytest.approx(math.exp(-3))
    assert mask_value("linear", 2e-4, 2_500) == pytest.approx(0.5)
    assert mask_value("linear", 2e-4, 5_001) == 0.0
    assert mask_value(None, 1.0, 0) == 0.0


def test_too_few_steps_for_the_schedule() -> None:
    with pytest.raises(ArgumentError, match="3 of 4 training steps are left for the 4 patterns"):
        NmSchedule(stepwise(1, 8), finetune=0.25).at(0, 4)


# ---- gradients, in float64 against the closed forms


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, requires_grad=True)


def forward_and_backward(weight: Tensor, **how) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, what the layer uses, gradient of that, gradient of the weight."""
    mask = nm_mask(weight.abs(), 2, 4)
    used = masked(weight, mask, **how)
    used.retain_grad()
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.nn.functional.linear(x, used).tanh().square().sum().backward()
    assert used.grad is not None
    assert weight.grad is not None
    return mask.double(), used.detach(), used.grad, weight.grad


def test_mask_decay_is_its_chain_rule(weight: Tensor) -> None:
    m, used, g, gradient = forward_and_backward(weight, value=0.3, grad="masked")
    torch.testing.assert_close(used, weight * (m + (1 - m) * 0.3), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, g * (m + (1 - m) * 0.3), rtol=0, atol=1e-15)


def test_mask_decay_as_published_passes_the_gradient_on(weight: Tensor) -> None:
    m, used, g, gradient = forward_and_backward(weight, value=0.3, grad="ste")
    torch.testing.assert_close(used, weight * (m + (1 - m) * 0.3), rtol=0, atol=1e-15)
    assert torch.equal(gradient, g)


def test_straight_through(weight: Tensor) -> None:
    m, used, g, gradient = forward_and_backward(weight, value=0.0, grad="ste")
    assert torch.equal(used, weight * m)
    assert torch.equal(gradient, g)


def test_sr_ste_pulls_pruned_weights(weight: Tensor) -> None:
    m, used, g, gradient = forward_and_backward(weight, value=0.0, grad="ste", pull=2e-4)
    assert torch.equal(used, weight * m)
    assert torch.equal(gradient, g + 2e-4 * (1 - m) * weight)


def test_masked_gradient_passes_gradcheck() -> None:
    w = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(w.abs(), 1, 4)
    assert torch.autograd.gradcheck(lambda t: masked(t, mask, 0.25, "masked"), (w,))


# ---- the pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.Linear(8 * 16, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.relu(self.up(h)))


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, 4, 4, generator=generator)
    labels = (x.flatten(1) @ torch.randn(64, 3, generator=generator)).argmax(1)
    return list(zip(x.split(16), labels.split(16), strict=True))


@pytest.fixture
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), (torch.randn(4, 4, 4, 4),), {"x": {0: "batch"}})


WEIGHTS = ("conv.weight", "up.weight", "head.weight")


def is_nm(weight: Tensor, n: int, m: int) -> bool:
    order = (0, *range(2, weight.dim()), 1)
    counts = (weight.permute(order).reshape(-1, m) != 0).sum(1)
    return bool((counts <= n).all())


@pytest.mark.parametrize("method", ["mask_decay", "structure_decay", "combined", "sr_ste", "ste"])
def test_every_method_ends_in_the_pattern(program: gw.Program, batches, method: str) -> None:
    before = {name: tensor.clone() for name, tensor in program.state.items()}
    step = Nm(n=1, m=4, method=method, tune={"steps": 20, "lr": 1e-2})
    result = step.execute(program, Context(training=batches))
    for name in WEIGHTS:
        assert is_nm(result.program.state[name], 1, 4), name
    assert result.metrics["sparsity"] == 0.75
    assert result.metrics["steps"] == 20
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    what = {action.layer: action.what for action in result.actions}
    assert what == dict.fromkeys(("conv", "up", "head"), "1:4 along the input channels")
    for name in ("conv.bias", "up.bias", "head.bias"):
        assert bool((result.program.state[name] != 0).all()), "biases are not masked"
    assert all(torch.equal(tensor, program.state[name]) for name, tensor in before.items())


def test_what_is_baked_is_what_was_trained(program: gw.Program, batches) -> None:
    """One more forward pass at the end of training, and the stored weights: the same."""
    seen: list[dict[str, Tensor]] = []
    rows = {
        layer.weight: nm_rows(layer, program.state[layer.weight], "input")
        for layer in select(program, ["conv", "up", "head"])
    }
    hook = NmTraining(rows, NmSchedule(((2, 4),), "exponential", 0.5, finetune=0.2), "masked")

    def evaluate(current: gw.Program) -> float:
        seen.append({name: tensor.clone() for name, tensor in current.state.items()})
        return 0.0

    options = TuneOptions(steps=10, keep_best=False)
    tune(program, batches, options, Context(), hooks=[hook], evaluate=evaluate)
    step = Nm(decay_rate=0.5, finetune=0.2, tune={"steps": 10})
    baked = step(program, training=batches, check=False)
    x = batches[0][0]
    parametrised = program.replace(state={**program.state, **seen[-1]})
    assert torch.equal(parametrised(x), baked(x))
    assert all(torch.equal(seen[-1][name], baked.state[name]) for name in WEIGHTS)


def losses(program: gw.Program, batches, steps: int, **options) -> list[float]:
    """Loss of every step, as a run that the pass does not shorten sees it."""
    rows = {
        layer.weight: nm_rows(layer, program.state[layer.weight], "input")
        for layer in select(program, ["conv", "up", "head"])
    }
    schedule = NmSchedule(((1, 4),), **options)
    hook = NmTraining(rows, schedule, "masked")
    tuned = tune(program, batches, TuneOptions(steps=steps), Context(), hooks=[hook])
    return list(tuned.history.losses)


def test_a_mask_value_of_one_is_dense_training(program: gw.Program, batches) -> None:
    dense = tune(program, batches, TuneOptions(steps=3), Context()).history.losses
    decayed = losses(program, batches, 3, decay="linear", rate=1e-300)
    assert decayed == list(dense)
    assert losses(program, batches, 3, decay=None) != list(dense)


def test_sr_ste_without_pull_is_straight_through(program: gw.Program, batches) -> None:
    tune = {"steps": 6, "lr": 1e-2}
    plain = Nm(method="ste", tune=tune)(program, training=batches, check=False)
    unpulled = Nm(method="sr_ste", pull=0.0, tune=tune)(program, training=batches, check=False)
    pulled = Nm(method="sr_ste", pull=0.1, tune=tune)(program, training=batches, check=False)
    assert all(torch.equal(plain.state[n], unpulled.state[n]) for n in plain.state)
    assert not torch.equal(plain.state["up.weight"], pulled.state["up.weight"])


def test_accumulated_batches_pull_once(batches) -> None:
    """Two halves of a batch: the gradient of the whole one, and the pull not twice."""
    halves = [(x[i : i + 8], y[i : i + 8]) for x, y in batches for i in (0, 8)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    net = gw.trace(model, (batches[0][0][:4],), {"input": {0: "batch"}})
    plain = {"steps": 2, "shuffle": False, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1}

    def state(data, **more) -> dict[str, Tensor]:
        step = Nm(method="sr_ste", pull=0.5, tune={**plain, **more})
        return step(net, training=data, check=False).state

    whole, parts = state(batches), state(halves, accumulate=2)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)  # float32


def test_evaluations_and_early_stops_see_the_final_masks(program: gw.Program, batches) -> None:
    """The best evaluation may lie in the dense phase: what comes out is what was measured."""
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def take(indices):
        return {"x": x[list(indices)], "labels": labels[list(indices)]}

    def read():
        return (take(range(i, i + 16)) for i in range(0, 64, 16))

    data = Batches("table", program.signature, read, "labels", rows=Rows(64, 16, take))
    tune = {"epochs": 6, "lr": 0.02, "hold_out": 0.25, "patience": 1}
    step = Nm(n=1, m=4, dense=0.5, decay_rate=0.5, tune=tune)
    result = step.execute(program, Context(training=data))
    assert result.metrics["sparsity"] == 0.75
    assert all(is_nm(result.program.state[name], 1, 4) for name in WEIGHTS)


def test_refusals_name_the_layer(program: gw.Program, batches) -> None:
    def run(steps: int = 8, **options) -> gw.Result:
        return Nm(**options, tune={"steps": steps}).execute(program, Context(training=batches))

    result = run(n=1, m=64, method="ste")
    reasons = {action.layer: action.reason for action in result.actions}
    assert reasons == {
        "conv": "its 36 weights per input row do not divide into groups of 64",
        "head": "its 32 weights per input row do not divide into groups of 64",
        "up": "",
    }
    kept = result.program.state["head.weight"]
    assert bool((kept != 0).all()), "a refused layer trains dense"
    # the largest M of a schedule counts: 1:8 begins at 8:64
    wide = {"n": 1, "m": 8, "method": "structure_decay", "structure": "geometric"}
    with pytest.raises(ModelError, match=r"head: no selected layer .*1:8.*groups of 64"):
        run(**wide, targets=["head"])
    assert is_nm(run(**wide, targets=["up"]).program.state["up.weight"], 1, 8)
    with pytest.raises(ArgumentError, match="2 of 2 training steps are left for the 4 patterns"):
        run(**wide, targets=["up"], steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4, "m": 4}, "n = 4 keeps all of m = 4"),
        ({"n": 2, "m": 6, "method": "structure_decay"}, "power of two"),
        ({"method": "sr_ste", "decay_rate": 0.1}, "decay_rate has no part in method sr_ste"),
        ({"method": "ste", "pull": 0.1}, "pull has no part in method ste"),
        ({"method": "ste", "grad": "ste"}, "grad has no part in method ste"),
        ({"method": "structure_decay", "decay": "linear"}, "decay has no part"),
        ({"method": "combined", "widest": 16}, "widest has no part in structure stepwise"),
        ({"method": "combined", "structure": "custom"}, "patterns belong to structure custom"),
        ({"method": "combined", "structure": "custom", "patterns": [[1, 2]]}, "not 2:4"),
        (
            {"method": "combined", "structure": "custom", "patterns": [[5, 4], [2, 4]]},
            "keeps more than there are",
        ),
        ({"dense": 0.6, "finetune": 0.4}, "leave no step"),
        ({"pattern": "2:4"}, "pattern"),
    ],
)
def test_options_that_do_not_go_together(options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Nm(**options)


def test_options_with_their_defaults_are_valid_again() -> None:
    """A resolved spec writes every default out."""
    for method in ("ste", "sr_ste", "combined"):
        step = Nm(method=method)
        assert Nm(**step.resolved_options()).options == step.options


class Shared(nn.Module):
    """A weight of two selected layers, one of an embedding too, a frozen one, a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.weight.requires_grad_(False)
        self.raw = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.frozen(self.second(torch.tanh(self.first(self.embed(ids)))))
        return self.head(nn.functional.linear(h, self.raw.tanh()))


def test_tied_frozen_and_computed_weights() -> None:
    ids = torch.randint(0, 8, (4, 6))
    program = gw.trace(Shared().eval(), (ids,))
    step = Nm(method="ste", tune={"steps": 2, "loss": "next_token"})
    result = step.execute(program, Context(training=[(ids, ids)]))
    reasons = {action.layer: action.reason for action in result.actions}
    assert reasons["first"] == reasons["second"] == ""
    assert reasons["frozen"] == "its weight is frozen"
    assert reasons["raw"] == "its weight is computed in the graph"
    assert reasons["head"].startswith("its weight is also read by embedding")
    tied = [layer for layer in select(result.program, ["first", "second"])]
    assert len({layer.weight for layer in tied}) == 1
    assert is_nm(result.program.state[tied[0].weight], 2, 4)
    assert bool((result.program.state["embed.weight"] != 0).all())
    alone = Nm(method="ste", targets=["first"], tune={"steps": 2, "loss": "next_token"})
    with pytest.raises(ModelError, match=r"first: no selected layer .*also read by linear"):
        alone(program, training=[(ids, ids)])


class Interrupt(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, at) -> None:
        if at.step == self.step:
            raise KeyboardInterrupt


def test_killed_and_started_again(
    program: gw.Program, batches, tmp_path: Path, monkeypatch
) -> None:
    """Stopped in the middle of a frame, the second run ends in the same bytes."""
    step = Nm(n=1, m=4, method="combined", decay_rate=0.2, tune={"steps": 12, "lr": 1e-2})
    straight = step.execute(program, Context(training=batches))
    context = Context(training=batches, work=tmp_path, checkpoint_seconds=0.0)
    original = NmTraining.before_step
    monkeypatch.setattr(NmTraining, "before_step", lambda self, at: Interrupt(7).before_step(at))
    with pytest.raises(KeyboardInterrupt):
        step.execute(program, context)
    monkeypatch.setattr(NmTraining, "before_step", original)
    again = step.execute(program, context)
    assert again.metrics == straight.metrics
    for name, tensor in straight.program.state.items():
        assert torch.equal(again.program.state[name], tensor), name
    other = Nm(n=1, m=4, method="ste", tune={"steps": 12, "lr": 1e-2})
    fresh = other.execute(program, Context(training=batches))
    beside = other.execute(program, context)
    assert fresh.metrics == beside.metrics, "a run with other options is another run"


def test_the_result_runs_in_onnxruntime(program: gw.Program, batches) -> None:
    pruned = Nm(tune={"steps": 4})(program, training=batches, check=False)
    x = batches[0][0]
    compiled = gw.lower(pruned, "onnxruntime")
    torch.testing.assert_close(compiled(x), pruned(x), rtol=1e-4, atol=1e-5)  # float32 sums
