from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.every_pass import TUNE
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import load_data
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.products import weight_node, weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.ir.stored.encoders import nearest
from graphwright.ir.stored.representation import Representation
from graphwright.passes.base import Result
from graphwright.passes.quantize._math.pv import Moments, PvHook, PvSettings, Weight

CHAIN = ("text", [("quantize.vptq", {"centroids": 16}), ("quantize.pv", {"tune": TUNE})])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return 4 * self.fc2(torch.relu(self.fc1(h)))


@pytest.fixture(scope="module")
def original() -> Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), {"x": torch.randn(4, 2, 8, 8)}, dynamic={"x": {0: "batch"}})


def batches(count: int = 12) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 2, 8, 8, generator=generator),) for _ in range(count)]


FORMS: dict[str, Any] = {
    "blocks": ("Rtn", {"bits": 2, "block": 16}),
    "rows": ("Rtn", {"bits": 3, "block": -1, "symmetric": True}),
    "nf4": ("Nf4", {"block": 32}),
    "vectors": ("Vptq", {"vector_length": 2, "centroids": 16, "residual_centroids": 8}),
    "outliers": ("Vptq", {"vector_length": 3, "centroids": 16, "outlier_percent": 20,
                          "outlier_vector_length": 2, "outlier_centroids": 8}),
    "int8": ("Int8", {}),
}  # fmt: skip


def compressed(original: Program, form: str) -> Program:
    name, options = FORMS[form]
    step = getattr(gw.passes.quantize, name)(**options)
    return step(original, calibration=batches(4), check=False)


def representation(program: Program, name: str = "fc1") -> Representation:
    layer = next(x for x in layers(program) if x.name == name)
    return Representation(program, weight_node(layer))


def settings(**changes: Any) -> PvSettings:
    values: dict[str, Any] = {
        "betas": (0.9, 0.95), "code_rate": 0.05, "code_betas": (0.0, 0.95), "lamb": True,
        "most": 0.02, "trust": None, "decay": 0.0, "codes": True, "continuous": True,
    }  # fmt: skip
    return PvSettings(**{**values, **changes})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_its_layer_reads_and_has_codes_and_numbers(
    original: Program, form: str
) -> None:
    program = compressed(original, form)
    rep = representation(program)
    layer = next(x for x in layers(program) if x.name == "fc1")
    assert torch.equal(rep.value(), weight_value(program, layer))
    assert rep.continuous
    assert rep.codes
    assert rep.places


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_numbers_are_those_of_the_whole(original: Program, form: str) -> None:
    """Against central differences of the weight, for every kind of stored float."""
    rep = representation(compressed(original, form))
    rep.stored = dict.fromkeys(rep.stored, torch.float32)  # no rounding between
    up = torch.randn(rep.value().shape, generator=torch.Generator().manual_seed(2))
    found = rep.gradients(up)
    for name, tensor in rep.continuous.items():
        flat = int(found[name].abs().argmax())
        moved = []
        step = 1e-2 * float(tensor.abs().max())
        for sign in (1, -1):
            changed = tensor.clone()
            changed.view(-1)[flat] += sign * step
            moved.append(float((rep.value({**rep.continuous, name: changed}) * up).sum()))
        numeric = (moved[0] - moved[1]) / (2 * step)
        assert float(found[name].flatten()[flat]) == pytest.approx(numeric, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_a_step_changes_few_groups_and_the_weight_is_what_its_codes_say(
    original: Program, form: str, share: float
) -> None:
    weight = Weight(representation(compressed(original, form)), settings(most=share))
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        value = weight.step(torch.randn(weight.buffer.shape, generator=generator), 1e-3, 0.7)
        assert torch.equal(value, weight.rep.value())
        assert weight.changed <= math.ceil(share * weight.groups)
    assert weight.codes_changed() > 0


@pytest.mark.parametrize("form", FORMS)
def test_without_rates_nothing_changes(original: Program, form: str) -> None:
    weight = Weight(representation(compressed(original, form)), settings())
    before = weight.rep.value()
    assert torch.equal(weight.step(torch.randn(before.shape), 0.0, 0.0), before)
    assert weight.codes_changed() == 0


@pytest.mark.parametrize("form", ["blocks", "nf4", "vectors", "outliers", "int8"])
def test_encoding_everything_finds_the_codes_again(original: Program, form: str) -> None:
    """Codes that were scrambled come back when the target is the weight they stood for."""
    rep = representation(compressed(original, form))
    wanted = rep.value()
    weight = Weight(rep, settings(most=1.0, continuous=False))
    for name in {n for place in rep.places for n in place.encoder.codes}:
        rep.codes[name] = rep.codes[name].flip(-1).contiguous()
    scrambled = rep.value()
    weight.buffer = wanted
    restored = weight._choose(scrambled)
    assert float((scrambled - wanted).norm()) > 0.1 * float(wanted.norm())
    assert float((restored - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_the_nearest_vector_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, first, second = (torch.randn(n, 4, generator=generator) for n in (30, 12, 6))
    (found,) = nearest(wanted, [first])
    assert found.tolist() == (wanted[:, None] - first).norm(dim=-1).argmin(1).tolist()
    i, k = nearest(wanted, [first, second])
    best = min_pairs(wanted, first, second)
    ours = (wanted - first[i] - second[k]).norm(dim=-1)
    assert bool((ours >= best - 1e-5).all())
    assert float((ours <= best + 1e-5).double().mean()) > 0.7  # a beam, not all pairs
    greedy = (wanted - first[found])[:, None] - second
    assert float(ours.sum()) <= float(greedy.norm(dim=-1).min(1).values.sum())


def min_pairs(wanted: Tensor, first: Tensor, second: Tensor) -> Tensor:
    pairs = [first[i] + second[k] for i, k in itertools.product(range(12), range(6))]
    return (wanted[:, None] - torch.stack(pairs)).norm(dim=-1).min(1).values


def test_the_trust_region_bounds_a_step_up_to_one_group(original: Program) -> None:
    for trust in (0.005, 0.02, 0.1):
        weight = Weight(
            representation(compressed(original, "blocks")),
            settings(most=0.5, trust=trust, continuous=False),
        )
        before = weight.rep.value()
        after = weight.step(torch.randn(before.shape), 0.0, 2.0)
        change = (after - before).abs().flatten().sort(descending=True).values
        bound = trust * float(before.norm())
        assert 0 < float(change.square().sum().sqrt()) <= bound + float(change[0])


TRAIN = {"tune": {"loss": "kl", "lr": 3e-3, "optimizer": "adam", "steps": 60, "epochs": 10,
                  "schedule": "constant"}}  # fmt: skip


def divergence(original: Program, program: Program) -> float:
    x = torch.randn(200, 2, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        target = original(x).log_softmax(-1)
        return float(nn.functional.kl_div(program(x).log_softmax(-1), target,
                                          reduction="batchmean", log_target=True))  # fmt: skip


@pytest.mark.slow
def test_training_codes_beats_training_the_rest_alone() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.fc2.weight.mul_(6)  # outputs that are sure of themselves
    sure = gw.trace(net, {"x": torch.randn(4, 2, 8, 8)}, dynamic={"x": {0: "batch"}})
    start = gw.passes.quantize.Rtn(bits=2, block=-1)(sure, check=False)
    how = {**TRAIN["tune"], "steps": 150, "epochs": 20, "schedule": "cosine"}
    found = {}
    ways = {"p": {"codes": False}, "pv": {"max_change": 0.05, "code_lr": 0.02}}
    for name, options in ways.items():
        tuned = gw.passes.quantize.Pv(**options, tune=how)(
            start, training=batches(), teacher=sure, check=False
        )
        found[name] = divergence(sure, tuned)
    assert found["pv"] < found["p"] < 0.5 * divergence(sure, start)


@pytest.mark.slow
def test_few_changes_a_step_beat_the_rest_alone_and_straight_through_training() -> None:
    ways = {"p": {"codes": False}, "pv": {}, "straight-through": {"max_change": 1.0}}
    total = dict.fromkeys((*ways, "start"), 0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        net = Net().eval()
        with torch.no_grad():
            net.fc2.weight.mul_(6)  # outputs that are sure of themselves
        sure = gw.trace(net, {"x": torch.randn(4, 2, 8, 8)}, dynamic={"x": {0: "batch"}})
        start = gw.passes.quantize.Rtn(bits=2, block=-1)(sure, check=False)
        total["start"] += divergence(sure, start)
        how = {**TRAIN["tune"], "steps": 100, "epochs": 20}
        for name, options in ways.items():
            step = gw.passes.quantize.Pv(**options, code_lr=0.03, tune=how)
            tuned = step(start, training=batches(), teacher=sure, check=False)
            total[name] += divergence(sure, tuned)
    assert total["pv"] < total["p"] < total["start"]
    assert total["pv"] < total["straight-through"]


def test_the_result_keeps_its_form_and_lowers(original: Program) -> None:
    start = compressed(original, "blocks")
    quick = {"tune": {**TRAIN["tune"], "steps": 12}, "code_lr": 0.1, "max_change": 0.1}
    result = gw.passes.quantize.Pv(**quick).run(
        start, Context(training=batches(4), teacher=original)
    )
    targets = [str(n.target) for n in result.program.graph.nodes]
    assert targets == [str(n.target) for n in start.graph.nodes]
    assert result.metrics["codes_changed"] > 0
    assert result.metrics["steps"] == 12
    told = {a.layer: a.what for a in result.actions}
    assert all(told[name].startswith("trained") for name in ("conv", "fc1", "fc2"))
    (x,) = batches(1)[0]
    compiled = gw.lower(result.program, "onnxruntime")
    expected = result.program(x).detach()
    assert float((compiled(x) - expected).norm() / expected.norm()) < 0.02
    again = gw.passes.quantize.Pv(**quick).run(
        start, Context(training=batches(4), teacher=original)
    )
    for name, tensor in result.program.state.items():
        assert torch.equal(tensor, again.program.state[name])


@pytest.mark.parametrize("form", ["blocks", "vectors"])
def test_killed_and_started_again_it_ends_in_the_same_bytes(
    original: Program, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = compressed(original, form)
    quick = {"tune": {**TRAIN["tune"], "steps": 6}, "code_lr": 0.3, "max_change": 0.1}
    step = gw.passes.quantize.Pv(**quick)
    straight = step.execute(start, Context(training=batches(4), teacher=original))
    context = Context(training=batches(4), teacher=original, work=tmp_path, checkpoint_seconds=0.0)
    whole = PvHook.before_step

    def killed(self: PvHook, at: Any) -> None:
        if at.step == 3:
            raise KeyboardInterrupt
        whole(self, at)

    monkeypatch.setattr(PvHook, "before_step", killed)
    with pytest.raises(KeyboardInterrupt):
        step.execute(start, context)
    monkeypatch.setattr(PvHook, "before_step", whole)
    again = step.execute(start, context)
    assert again.metrics == straight.metrics
    for name, tensor in straight.program.state.items():
        assert torch.equal(again.program.state[name], tensor), name


def test_only_what_is_selected_moves(original: Program) -> None:
    start = compressed(original, "blocks")
    quick = {"tune": {**TRAIN["tune"], "steps": 3}}
    tuned = gw.passes.quantize.Pv(**quick, targets=["fc1"], rest=False)(
        start, training=batches(3), teacher=original, check=False
    )
    changed = {n for n, t in tuned.state.items() if not torch.equal(t, start.state[n])}
    assert changed
    assert all(name.startswith("fc1.weight_") for name in changed)


def test_what_tune_does_not_say_is_the_papers_recipe() -> None:
    tune = gw.passes.quantize.Pv(tune={"steps": 7, "lr": 1e-3}).options.tune
    assert (tune.steps, tune.lr) == (7, 1e-3)
    assert (tune.loss, tune.optimizer, tune.schedule) == ("kl", "adam", "constant")
    assert tune.betas == (0.90, 0.95)
    assert gw.passes.quantize.Pv().options.tune.lr == 3e-4


def test_a_float_program_is_refused(original: Program) -> None:
    with pytest.raises(ModelError, match="no selected layer has a weight made of codes"):
        gw.passes.quantize.Pv()(original, training=batches(2), teacher=original)


@pytest.mark.parametrize(
    ("betas", "lamb"), [((0.0, 0.95), True), ((0.9, 0.95), True), ((0.9, 0.95), False)]
)
def test_steps_are_those_of_the_released_code(betas: tuple[float, float], lamb: bool) -> None:
    """Its formula in float64: the bias correction scales the step, the trust ratio the update."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=generator)
    moments, wanted = Moments(x), x.double()
    mean, square = torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    for step in range(1, 6):
        gradient = torch.randn(5, 7, generator=generator)
        mean = betas[0] * mean + (1 - betas[0]) * gradient.double()
        square = betas[1] * square + (1 - betas[1]) * gradient.double() ** 2
        update = mean / (square.sqrt() + 1e-6)
        scale = 0.01 * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
        if lamb:
            scale *= float(wanted.norm() / update.norm())
        wanted = wanted - scale * update
        moved = moments.step(x, gradient, 0.01, betas, lamb)
        if step == 1 and lamb:
            share = float((moved - x).norm() / x.norm())
            assert share == pytest.approx(0.01 * math.sqrt(0.05) / (1 - betas[0]), rel=1e-4)
        x = moved
        torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_is_not_quantized_moves_as_scales_do(original: Program) -> None:
    """Biases of a first step move by a share of their norm, not by an absolute rate."""
    start = compressed(original, "blocks")
    for tune, share in (({}, 1.0), ({"optimizer": "sgd"}, None)):
        how = {"tune": {"lr": 1e-3, "steps": 1, **tune}, "codes": False}
        tuned = gw.passes.quantize.Pv(**how)(
            start, training=batches(2), teacher=original, check=False
        )
        old, new = start.state["fc2.bias"].detach(), tuned.state["fc2.bias"].detach()
        moved = float((new - old).norm() / old.norm())
        expected = 1e-3 * math.sqrt(0.05) / 0.1
        assert (moved == pytest.approx(expected, rel=1e-3)) is (share is not None)


@pytest.mark.parametrize("form", ["blocks", "vectors"])
def test_the_best_evaluation_is_the_result(
    original: Program, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and biases come back as they were at the third step, which is called best."""
    start = compressed(original, form)
    np.savez(tmp_path / "x.npz", x=torch.cat([x for (x,) in batches(4)]).numpy())
    section = {"data": "x.npz", "batch_size": 32}
    data = load_data(section, original.signature, 0, root=tmp_path)
    monkeypatch.setattr(
        "graphwright.ir.tune.engine._Loop._held_out_score", lambda self, _: abs(self.step - 3)
    )

    def trained(steps: int, **given: Any) -> Result:
        tune = {"lr": 0.01, "steps": steps, "hold_out": 0.25, "evaluate_every": 1, **given}
        how = gw.passes.quantize.Pv(tune={"epochs": 9, **tune}, code_lr=1.0, max_change=0.2)
        return how.run(start, Context(training=data, teacher=original))

    best, last = trained(6), trained(6, keep_best=False)
    assert best.metrics["best_step"] == 3
    kept = trained(3, keep_best=False).program.state
    changed = [n for n, t in last.program.state.items() if not torch.equal(t, kept[n])]
    assert any("codes" in name or "indices" in name for name in changed)
    for name, tensor in best.program.state.items():
        assert torch.equal(tensor, kept[name]), name
