"""tune.progressive: a step of the student is two of its teacher, in closed form; two samplers."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from models import planar
from models.mixture import mixture
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import END, Grid
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.schedule import NoiseSchedule
from graphwright.ir.sampling.training import Training
from graphwright.passes.tune import GuidanceDistill, Progressive
from graphwright.passes.tune.progressive import Halving, first_share

DENOISER = ("sample.denoiser", {"parameterization": "v", "unconditional": {"label": 4}})
SHORT = {"steps": 1, "start": 4, "longer": 1, "tune": {"steps": 1}}
CHAIN = ("denoiser", [DENOISER, ("tune.progressive", {**SHORT, "grid": {"spacing": "trailing"}})])

COSINE = NoiseSchedule(beta_schedule="squaredcos_cap_v2")
PATHS = [
    (COSINE, {"spacing": "trailing"}),
    (NoiseSchedule(kind="edm"), {"spacing": "karras"}),
    (NoiseSchedule(kind="flow"), {"spacing": "uniform", "end": 0.02}),
]


def ddim(x: Tensor, here, there) -> Tensor:
    """A step by the closed form D of the mixture, in float64."""
    a, s = (torch.full((len(x), 1), v, dtype=torch.float64) for v in (here.a, here.s))
    data = mixture().denoised(x, a, s)
    return there.a * data + there.s * (x - here.a * data) / here.s


@pytest.mark.parametrize(("schedule", "grid"), PATHS, ids=lambda x: str(x)[:24])
def test_the_mean_of_two_predictions_is_the_target_of_the_paper(schedule, grid: dict) -> None:
    """(z'' - (s''/s) z) / (a'' - (s''/s) a), and one step to it is two of the teacher's."""
    levels = Grid(**grid).levels(schedule, 8)
    g = torch.Generator().manual_seed(0)
    for i in range(0, 8, 2):
        here, between, there = levels[i : i + 3]
        x = here.a * mixture().sample(50, g) + here.s * torch.randn(50, 2, generator=g).double()
        a, s = (torch.full((50, 1), v, dtype=torch.float64) for v in (here.a, here.s))
        moved = ddim(x, here, between)
        first = mixture().denoised(x, a, s)
        second = mixture().denoised(moved, between.a + 0 * a, between.s + 0 * s)
        w = first_share(here, between, there)
        target = w * first + (1 - w) * second
        arrived = ddim(moved, between, there)
        ratio = there.s / here.s
        wanted = (arrived - ratio * x) / (there.a - ratio * here.a)
        torch.testing.assert_close(target, wanted, rtol=1e-9, atol=1e-9)
        one = there.a * target + there.s * (x - here.a * target) / here.s
        torch.testing.assert_close(one, arrived, rtol=1e-11, atol=1e-11)
    assert first_share(levels[-2], END, END) == 1.0


@pytest.mark.parametrize("jump", [1, 2])
def test_the_recipes_target_is_two_steps_of_the_teacher(jump: int) -> None:
    """In one batch, at every level; with steps of twice the length those at the end are cut."""
    training = Training(planar.corrected(), "test")
    levels = training.path(Grid(spacing="karras"), 8).levels
    hook = Halving(training, Context(), training.program, levels, jump, "truncated_snr")
    places = [0, 1, 2, 3]
    g = torch.Generator().manual_seed(1)
    x = torch.stack([levels[2 * i].s * torch.randn(2, generator=g) for i in places])
    found = hook.target(x, places, {"label": torch.full((4,), planar.WHOLE)})
    for row, i in enumerate(places):
        here, z = levels[2 * i], x[row : row + 1].double()
        ends = [levels[min(2 * i + n * jump, 8)] for n in (1, 2)]
        arrived = ddim(z, here, ends[0])
        arrived = ddim(arrived, *ends) if ends[0].s > 0 else arrived
        ratio = ends[1].s / here.s
        wanted = (arrived - ratio * z) / (ends[1].a - ratio * here.a)
        torch.testing.assert_close(found[row].double(), wanted[0], rtol=0, atol=2e-5)


@cache
def noise() -> Tensor:
    return torch.randn(256, 2, generator=torch.Generator().manual_seed(0))


LABELS = {"label": torch.arange(256) % 4}


def distilled(**options) -> gw.Program:
    given = {"start": 16, "steps": 2, "longer": 1, "tune": {"steps": 60, "lr": 3e-3}, **options}
    return Progressive(**given)(planar.corrected(), training=planar.data(8))


def test_a_student_follows_its_teacher_better_than_fewer_steps_of_the_teacher_do() -> None:
    student = distilled()
    record = Denoiser.required(student, "test")
    assert (record.steps, record.solver, record.grid["stride"]) == (2, "ddim", 8)
    teacher = Sampler.of(planar.corrected())
    wanted = teacher.sample(noise(), LABELS, steps=16, solver="ddim")
    found = Sampler.of(student).sample(noise(), LABELS)
    plain = teacher.sample(noise(), LABELS, steps=2, solver="ddim", grid=record.grid)
    errors = [float((x - wanted).norm(dim=1).mean()) for x in (found, plain)]
    assert errors[0] < 0.75 * errors[1]


def test_the_stochastic_student_samples_with_fresh_noise(tmp_path) -> None:
    student = distilled(start=8, sampler="stochastic")
    sampler = Sampler.of(student)
    assert sampler.record.solver == "double_step"
    found = [sampler.sample(noise(), LABELS, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    with pytest.raises(ArgumentError, match="fresh noise"):
        sampler.sample(noise(), LABELS)
    gw.lower(student, "onnxruntime").save(tmp_path)
    made = gw.load(tmp_path).sample(noise(), LABELS, seed=0)
    torch.testing.assert_close(made, found[0], rtol=0, atol=1e-3)


def test_a_spec_distils_guidance_and_then_steps(tmp_path) -> None:
    planar.network().save(tmp_path / "model.pt2")
    rows = planar.data(1, 64)[0]
    np.savez(tmp_path / "data.npz", **{n: t.numpy() for n, t in rows.items()},
             sigma_in=np.zeros(64, "float32"))  # fmt: skip
    (tmp_path / "spec.yaml").write_text("""\
version: 1
training: {data: data.npz, batch_size: 32}
passes:
  - sample.denoiser:
      parameterization: x0
      schedule: {kind: edm, sigma_min: 0.05, sigma_max: 10.0, time: sigma}
      grid: {spacing: karras}
      unconditional: {label: 3}
  - tune.guidance_distill: {width: 16, tune: {steps: 2}}
  - tune.progressive: {start: 4, steps: 1, tune: {steps: 2}}
lower: [onnxruntime]
""")
    outcome = gw.optimize(tmp_path / "model.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    rows = [record["id"] for record in outcome.report["passes"]]
    assert rows == ["sample.denoiser", "tune.guidance_distill", "tune.progressive"]
    assert outcome.report["passes"][2]["metrics"]["to_1_steps"] == 4.0  # twice as long
    bundle = gw.load(next((tmp_path / "out").rglob("program.json")).parent)
    made = bundle.sample(noise()[:8], {"label": LABELS["label"][:8] % 3}, guidance_scale=3.0)
    assert bundle.sampler.evaluations == 1
    assert made.isfinite().all()


def test_teacher_and_student_are_told_the_same_scale() -> None:
    options = {"width": 16, "tune": {"steps": 1}}
    told = GuidanceDistill(scale_max=4.0, **options)(planar.corrected(), training=planar.data(1))
    training = Training(told, "test")
    levels = training.path(Grid(spacing="karras"), 4).levels
    hook = Halving(training, Context(), told, levels, 1, "truncated_snr")
    seen = []
    teacher = hook.teacher
    hook.teacher = lambda given: (seen.append(given["guidance_scale"]), teacher(given))[1]
    at = type("At", (), {"step": 0, "micro": 0})()
    made = hook.on_batch(at, planar.data(1, 50)[0])
    scales = made["guidance_scale"]
    assert len(seen) == 2
    assert all(torch.equal(each, scales) for each in seen)
    assert 1 <= float(scales.min()) < 1.5 < 3.5 < float(scales.max()) <= 4


def test_a_student_goes_on_from_its_own_steps() -> None:
    program = Training(planar.corrected(), "test").sampled_in(
        planar.corrected(), 4, Grid(spacing="karras", stride=4)
    )
    made = Progressive(steps=2, tune={"steps": 1})(program, training=planar.data(1))
    assert Denoiser.required(made, "test").grid["stride"] == 8
    with pytest.raises(ArgumentError, match="its student has to start there"):
        Progressive(start=8, steps=2)(program, training=planar.data(1))
    with pytest.raises(ArgumentError, match="leave nothing to halve to 4"):
        Progressive(steps=4)(program, training=planar.data(1))


def test_refusals_and_warnings() -> None:
    for options in ({"start": 12, "steps": 4}, {"start": 4, "steps": 4}, {"start": 6, "steps": 4}):
        with pytest.raises(ArgumentError, match=r"has to be steps .* times a power of two"):
            Progressive(**options)
    table = planar.otherwise(
        planar.corrected(), schedule={"kind": "table"}, parameterization="epsilon",
        grid={"spacing": "trailing"},
    )  # fmt: skip
    quick = {"start": 4, "steps": 2, "longer": 1, "tune": {"steps": 1}}
    with pytest.warns(UserWarning, match="divides it by 0.0064"):
        Progressive(**quick)(table, training=planar.data(1), check=False)
    with pytest.raises(ArgumentError, match="2048 steps of a table of 1000"):
        Progressive(start=2048, steps=1)(table, training=planar.data(1))
