"""Denoisers in training: levels, data, numbers that a network is told, records of few steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import planar

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.schedule import NoiseSchedule
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.solvers.first import DoubleStep
from graphwright.ir.sampling.surgery import Interface
from graphwright.ir.sampling.told import Waves, tell, time_layer
from graphwright.ir.sampling.training import (
    Levels,
    Recipe,
    Regression,
    Training,
    snr_plus_one,
    truncated_snr,
)
from graphwright.ir.tune import Moment, OwnLoss, tune

GRIDS = [
    (NoiseSchedule(), {"spacing": "trailing"}),
    (NoiseSchedule(), {"spacing": "leading", "final": "first"}),
    (NoiseSchedule(kind="edm"), {"spacing": "karras"}),
    (NoiseSchedule(kind="vp"), {"spacing": "uniform", "end": 0.01, "final": "none"}),
]


@pytest.mark.parametrize(("schedule", "grid"), GRIDS, ids=lambda x: str(x)[:30])
def test_a_student_walks_on_every_so_many_th_level(schedule: NoiseSchedule, grid: dict) -> None:
    whole = Grid(**grid).levels(schedule, 16)
    assert Grid(**grid, stride=4).levels(schedule, 4) == whole[::4]
    assert Grid(**grid, stride=16).levels(schedule, 1) == (whole[0], whole[-1])


def test_levels_are_drawn_where_the_network_is_trained() -> None:
    g = torch.Generator().manual_seed(0)
    program = planar.corrected()
    table = {"kind": "table", "trained_betas": [*[0.3] * 9, 1.0]}
    for kind, has_last in (("epsilon", False), ("v", True)):
        made = planar.otherwise(program, parameterization=kind, schedule=table)
        drawn = Training(made, "test").draw(500, g)
        assert (max(level.t for level in drawn) == 9) is has_last
        assert {level.t for level in drawn} >= set(range(9))
    edm = Training(program, "test").draw(4000, g)
    logs = torch.tensor([math.log(level.s) for level in edm])
    assert abs(float(logs.mean()) + 1.2) < 0.1  # of 4000, cut at the ends of the schedule
    assert min(level.s for level in edm) >= 0.05
    flow = planar.otherwise(program, schedule={"kind": "flow"})
    places = [level.t for level in Training(flow, "test").draw(4000, g)]
    assert 0 < min(places) < 0.01
    assert 0.99 < max(places) < 1


def test_data_is_samples_and_conditions_alone() -> None:
    training = Training(planar.corrected(), "test")
    (batch,) = training.data([{"sample": torch.ones(3, 2), "label": torch.tensor([0, 1, 2])}])
    assert list(batch) == ["sample", "label"]
    levels = Levels.of(training.draw(3, torch.Generator().manual_seed(0)))
    given = training.inputs(batch["sample"], levels, training.conditions(batch))
    assert {spec.name for spec in training.program.signature.inputs} == set(given)
    assert torch.equal(given["sigma_in"], levels.s)  # an edm network is told sigma
    with pytest.raises(ArgumentError, match="nothing for input 'label'"):
        training.data([{"sample": torch.ones(3, 2)}])
    assert training.without(given)["label"].tolist() == [3, 3, 3]


def test_weights_of_levels() -> None:
    level = Levels(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), torch.zeros(2))
    torch.testing.assert_close(truncated_snr(level), torch.tensor([16 / 9, 1.0]))
    torch.testing.assert_close(snr_plus_one(level), torch.tensor([25 / 9, 25 / 16]))


class Copies(Regression):
    """Follows a frozen copy at drawn levels, and keeps what it drew."""

    def __init__(self, training: Training, context: Context) -> None:
        super().__init__(training, context)
        self.seen: list[torch.Tensor] = []

    def on_batch(self, at: Moment, batch):
        g, asked = self.generator(at), self.training
        clean = batch["sample"]
        levels = Levels.of(asked.draw(len(clean), g))
        x = levels.noised(clean, torch.randn(clean.shape, generator=g))
        self.seen.append(x)
        given = asked.conditions(batch)
        teacher = asked.teacher(asked.program, torch.device("cpu"))
        target = teacher(asked.inputs(x, levels, given))["denoised"]
        return {**batch, **asked.inputs(x, levels, given), self.TARGET: target + 1,
                self.WEIGHT: torch.full((len(x),), 3.0)}  # fmt: skip


def test_a_recipe_trains_a_denoiser_without_labels_and_with_an_average() -> None:
    training = Training(planar.corrected(), "test")
    data = training.data(planar.data(2, 8))
    runs = []
    for seed in (0, 0, 1):
        context = Context(seed=seed)
        hook = Copies(training, context)
        options = OwnLoss(steps=2, lr=1e-3, ema=0.99)
        runs.append((tune(training.program, data, options, context, hooks=[hook]), hook.seen))
    assert runs[0][0].history.losses[0] == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(runs[0][1][1], runs[1][1][1])
    assert not torch.equal(runs[0][1][0], runs[0][1][1])
    assert not torch.equal(runs[0][1][1], runs[2][1][1])
    assert not Recipe.counts_on_last_step


def test_what_is_no_network_of_one_row_per_sample_is_refused() -> None:
    program = planar.corrected()
    with pytest.raises(ModelError, match=r"sample\.cfg has put guidance around"):
        Training(gw.passes.sample.Cfg()(program), "test")
    with pytest.raises(ModelError, match="take over parts of earlier ones"):
        Training(planar.otherwise(program, cached=("middle",)), "test")
    with pytest.raises(ModelError, match="nothing says that this program is a denoiser"):
        Training(program.replace(facts={}), "test")
    bare = Training(planar.otherwise(program, conditions={"label": None}), "test")
    with pytest.raises(ModelError, match="no number stands for the lack of 'label'"):
        bare.without({})


# ---- a number that a network is told


def test_waves_are_those_of_diffusers() -> None:
    """The formula of `get_guidance_scale_embedding`, in float64."""
    scales = np.array([1.0, 2.5, 8.0])
    rates = np.exp(np.arange(32) * -(np.log(10000.0) / 31))
    angles = 1000.0 * (scales - 1)[:, None] * rates
    wanted = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    found = Waves(64, shift=-1.0)(torch.tensor(scales, dtype=torch.float32))
    # float32 angles up to 7000: their own rounding is 5e-4
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=0, atol=1e-3)


def test_a_network_is_told_a_number_and_gives_what_it_gave() -> None:
    program = planar.corrected()
    edit = Interface(program, "test")
    tell(edit, "test", "omega", 1.0, width=16)
    made = edit.finish()
    wanted = program.run_flat(program.examples)
    for number in (torch.tensor(1.0), torch.tensor(7.0), torch.tensor([0.5, 3.0, 4.0, 5.0])):
        found = made.run_flat((*program.examples, number))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    names = ["omega.projection.weight", "leave.weight"]
    ones = {name: torch.nn.Parameter(torch.ones_like(made.state[name])) for name in names}
    heard = made.replace(state={**made.state, **ones})
    rows = torch.tensor([0.5, 3.0, 0.5, 3.0])
    both = heard.run_flat((*program.examples, rows))[0]
    each = [heard.run_flat((*program.examples, n))[0] for n in rows]
    torch.testing.assert_close(both, torch.stack([each[i][i] for i in range(4)]))
    assert not torch.allclose(each[0], each[1])
    assert time_layer(program, "test").name == "time.0"
    with pytest.raises(ModelError, match="no linear layer of this network sees the time alone"):
        time_layer(planar.otherwise(program, time=None), "test")


# ---- records of few steps


def test_a_record_says_how_many_steps() -> None:
    training = Training(planar.corrected(), "test")
    program = training.program
    few = training.sampled_in(program, 2, Grid(spacing="karras", stride=8))
    noise, given = torch.randn(4, 2), {"label": torch.tensor([0, 1, 2, 3])}
    whole = Grid(spacing="karras").levels(training.schedule, 16)
    plan = Sampler.of(few).plan(4, given)
    assert plan.path.levels == (whole[0], whole[8], whole[16])
    found = Sampler.of(few).sample(noise, given)
    wanted = Sampler.of(program).sample(noise, given, steps=2, solver="ddim",
                                        grid={"spacing": "karras", "stride": 8})  # fmt: skip
    assert torch.equal(found, wanted)
    with pytest.warns(UserWarning, match="trained to be sampled in 2 steps of ddim"):
        Sampler.of(few).sample(noise, given, steps=4)
    with pytest.raises(ArgumentError, match="how many steps"):
        Sampler.of(program).sample(noise, given)


def test_double_steps_go_back_half_of_their_way_by_noise() -> None:
    schedule = NoiseSchedule()
    path = Path(schedule, Grid(spacing="trailing").levels(schedule, 4))
    g = torch.Generator().manual_seed(0)
    x, *noise = (torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(5))

    def denoise(x, level):  # data of N(0, 0.25 I)
        data = level.a * 0.25 * x / (level.a**2 * 0.25 + level.s**2)
        return Prediction(data, (x - level.a * data) / level.s)

    wanted = x
    for i in range(4):
        here, data = path.levels[i], denoise(wanted, path.levels[i])
        far, there = path.levels[min(i + 2, 4)], path.levels[i + 1]
        wanted = far.a * data.denoised + far.s * data.noise
        if i < 3:
            ratio = there.a / far.a
            spread = math.sqrt(1 - there.a**2 - ratio**2 * (1 - far.a**2))  # vp: a^2 + s^2 = 1
            wanted = ratio * wanted + spread * noise[i]
        found, _ = DoubleStep().step(denoise, x, path, i, {}, [noise[i]])
        torch.testing.assert_close(found, wanted)
        x = found
    assert here.t == path.levels[3].t
