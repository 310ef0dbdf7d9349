"""tune.trajectory: jumps against closed forms and solvers, balanced losses, learned guidance."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from models import denoisers, planar
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.schedule import NoiseSchedule
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.solvers.table import make_solver
from graphwright.ir.sampling.training import Levels, Training
from graphwright.ir.tune import Moment
from graphwright.ir.tune.working import copied
from graphwright.passes.tune import GuidanceDistill, Trajectory
from graphwright.passes.tune._denoisers.distance import Features
from graphwright.passes.tune._denoisers.heun import GuidedHeun
from graphwright.passes.tune.trajectory import Jumping

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}, "parameterization": "v"})
CHAIN = (
    "denoiser",
    [DENOISER, ("tune.trajectory", {"tune": {"steps": 2}, "levels": 4, "width": 8})],
)

CPU = torch.device("cpu")
EDM = NoiseSchedule.model_validate(planar.SCHEDULE)


class Gaussian(nn.Module):
    """E[x0 | x] for data N(0, 0.49)."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(0.49))

    def forward(self, sample: Tensor, sigma_in: Tensor) -> Tensor:
        s = sigma_in[:, None]
        return self.variance * sample / (self.variance + s * s)


@cache
def gaussian() -> gw.Program:
    inputs = {"sample": torch.randn(4, 2), "sigma_in": torch.tensor([0.3, 1.0, 4.0, 9.0])}
    free = {name: {0: "batch"} for name in inputs}
    program = gw.trace(Gaussian().eval(), inputs, free, ranges={"sigma_in": (0.1, 10.0)})
    return gw.passes.sample.Denoiser(parameterization="x0", schedule=planar.SCHEDULE)(program)


def levels(count: int) -> tuple:
    return Grid(spacing="karras", final="none").levels(EDM, count - 1)


@pytest.mark.parametrize("count", [20, 40])
def test_the_teachers_steps_are_the_trajectory_in_closed_form(count: int) -> None:
    """Of N(0, v): x sqrt((v + s^2) / (v + t^2)); the error falls with the square of the steps."""
    heun = GuidedHeun(Training(gaussian(), "test"), CPU)
    grid, starts = levels(count), (0, 1, 3, 0)
    x = torch.tensor([[3.0, -1.0], [8.0, 2.0], [1.0, 1.0], [-6.0, 9.0]])
    ways = [Levels.of([grid[s + i] for s in starts]) for i in range(count - 4)]
    found = heun.solved(x, ways, {}, None)
    t, s = ways[0].s[:, None], ways[-1].s[:, None]
    exact = x * ((0.49 + s**2) / (0.49 + t**2)).sqrt()
    assert float((found - exact).abs().max() / exact.abs().max()) < 8.0 / count**2


def test_guided_steps_of_the_teacher_are_those_of_the_solver_on_a_guided_program() -> None:
    labels = {"label": torch.tensor([0, 1, 2, 0])}
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    grid = Grid(spacing="karras", final="none")
    guided = Sampler.of(gw.passes.sample.Cfg(guidance_scale=3.0)(planar.corrected()))
    wanted = guided.sample(noise, labels, steps=6, solver="heun", grid=grid)
    ways = [Levels.of([level] * 4) for level in levels(7)]
    heun = GuidedHeun(Training(planar.corrected(), "test"), CPU)
    found = heun.solved(noise * 10.0, ways, labels, torch.full((4,), 3.0))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_distance_is_that_of_a_plain_loop_over_layers() -> None:
    training = Training(denoisers.conv_denoiser(), "test")
    net = denoisers.ConvDenoiser().eval()
    net.load_state_dict({name: training.program.state[name] for name in net.state_dict()})
    distance = Features(training, ("*",))
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 2, 8, 8, generator=g) for _ in range(2))
    at = Levels.of([training.schedule.level(t) for t in (900.0, 300.0, 10.0)])
    label = torch.tensor([0, 3, 1])
    found = distance(a, b, at, {"label": label})
    kept: list[list[Tensor]] = [[], []]
    convs = (nn.Conv2d, nn.ConvTranspose2d)
    for side, x in enumerate((a, b)):
        hooks = [m.register_forward_hook(lambda _m, _i, out, s=side: kept[s].append(out))
                 for m in net.modules() if isinstance(m, convs)]  # fmt: skip
        net(x, at.time.float(), label)
        [hook.remove() for hook in hooks]
    assert len(kept[0]) == 5, "the embeddings see no sample"
    expected = torch.zeros(3)
    for one, two in zip(*kept, strict=True):
        for row in range(3):
            u, v = (part[row] / part[row].norm(dim=0, keepdim=True) for part in (one, two))
            expected[row] += (u - v).square().mean().detach()
    torch.testing.assert_close(found, expected)
    assert torch.equal(distance(a, a, at, {"label": label}), torch.zeros(3))
    a.requires_grad_()
    (slope,) = torch.autograd.grad(distance(a, b, at, {"label": label}).sum(), a)
    assert float(slope.abs().min()) >= 0
    assert float(slope.abs().max()) > 0
    with pytest.raises(ModelError, match="sees the sample"):
        Features(training, ("time",))


def test_a_jump_with_fresh_noise_follows_its_formula() -> None:
    """On a path with a signal that shrinks, against numbers; and no noise is put in at the end."""
    path = Path(NoiseSchedule(kind="vp"), Grid(spacing="uniform", end=1e-3, final="none").levels(
        NoiseSchedule(kind="vp"), 2))  # fmt: skip
    g = torch.Generator().manual_seed(2)
    x, data, noise = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(3))
    solver, (first, middle, last) = make_solver("jump", gamma=0.6), path.levels
    said = Prediction(data, (x - first.a * data) / first.s)
    found, _ = solver.step(lambda _x, _level: said, x, path, 0, {}, [noise])
    low = 0.8 * (middle.sigma - last.sigma) + last.sigma
    assert solver.target(path, 0).sigma == pytest.approx(low)
    jumped = data + low * said.noise  # the sample by its signal
    expected = middle.a * (jumped + (middle.sigma**2 - low**2) ** 0.5 * noise)
    torch.testing.assert_close(found, expected)
    end, _ = solver.step(lambda _x, _level: said, x, path, 1, {}, [noise])
    torch.testing.assert_close(end, last.a * data + last.s * said.noise)
    assert make_solver("jump").draws == 0
    assert solver.draws == 1


@cache
def student() -> gw.Program:
    options = {
        "levels": 8, "teacher_steps": 3, "width": 32, "scale_min": 1.0, "scale_max": 4.0,
        "guidance_scale": 2.0, "target_ema": 0.9, "tune": {"steps": 160, "lr": 3e-3, "ema": 0.9},
    }  # fmt: skip
    return Trajectory(**options)(planar.corrected(), training=planar.data())


@cache
def untrained() -> gw.Program:
    options = {"levels": 8, "width": 32, "tune": {"steps": 1, "lr": 1e-12}}
    return Trajectory(**options)(planar.corrected(), training=planar.data(1, 16))


def asked() -> tuple[Tensor, dict[str, Tensor]]:
    labels = {"label": torch.arange(300) % 3}
    return torch.randn(300, 2, generator=torch.Generator().manual_seed(1)), labels


def test_before_training_every_jump_is_a_step_of_the_denoiser() -> None:
    noise, labels = asked()
    grid = Grid(spacing="karras", final="none")
    wanted = Sampler.of(planar.corrected()).sample(noise, labels, steps=4, grid=grid)
    found = Sampler.of(untrained()).sample(noise, labels, steps=4, guidance_scale=4.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_jump_learns_the_guided_trajectory() -> None:
    noise, labels = asked()
    guided = Sampler.of(gw.passes.sample.Cfg(guidance_scale=2.0)(planar.corrected()))
    grid = Grid(spacing="karras", final="none")
    exact = guided.sample(noise, labels, steps=40, solver="heun", grid=grid)
    start = guided.sample(noise, labels, steps=1, solver="euler", grid=grid)
    sampler = Sampler.of(student())
    errors = []
    for steps in (1, 4):
        found = sampler.sample(noise, labels, steps=steps)
        assert sampler.evaluations == steps
        errors.append(float((found - exact).square().sum(1).mean()))
    before = float((start - exact).square().sum(1).mean())
    assert errors[0] < 0.5 * before
    assert errors[1] < 0.5 * before
    other = sampler.sample(noise, labels, steps=1, guidance_scale=4.0)
    assert float((other - sampler.sample(noise, labels, steps=1)).abs().mean()) > 0.01


def test_a_jump_to_where_it_is_changes_nothing() -> None:
    x, labels = asked()
    s = torch.full((300,), 2.0)
    told = torch.tensor(levels(8)[3].told), torch.tensor(3.0)
    data, noise = student().run_flat((x, s, labels["label"], torch.ones(300), s, *told))
    torch.testing.assert_close(data + 2.0 * noise, x, rtol=0, atol=1e-5)


def test_the_denoising_loss_is_balanced_at_the_last_layer() -> None:
    """Its gradient there is as large as that of the jumps."""
    training = Training(planar.corrected(), "test")
    (batch,) = planar.data(1, 32)
    program = student()
    live = copied(program, CPU)
    names = [spec.name for spec in program.signature.inputs]
    at = Moment(0, 5, 0, dict(live.named_parameters()), torch.optim.SGD(live.parameters(), lr=1.0))
    found = []
    for weight in (0.0, 0.5):
        options = replace_weight(weight)
        hook = Jumping(training, Context(), options, levels(8), program)
        made = hook.on_batch(at, batch)
        runs = [made, *hook.also_run(at, made)]
        outs = [dict(zip(("denoised", "noise"), live(*(r[n] for n in names)), strict=True))
                for r in runs]  # fmt: skip
        seen = replace(at, also=tuple(outs[1:]))
        loss = hook.on_loss(seen, torch.zeros(()), outs[0], made)
        assert hook.last == "leave.weight"
        found.append(torch.autograd.grad(loss, at.parameters[hook.last])[0])
    extra = float((found[1] - found[0]).norm())
    assert extra == pytest.approx(0.5 * float(found[0].norm()), rel=1e-3)


def test_the_average_follows_what_is_trained() -> None:
    program = student()
    options = Trajectory(levels=8, width=32, target_ema=0.75).options
    hook = Jumping(Training(planar.corrected(), "test"), Context(), options, levels(8), program)
    moved = {name: nn.Parameter(p.detach() + 4.0) for name, p in program.trainable().items()}
    before = {name: p.clone() for name, p in hook.average.named_parameters()}
    hook.after_step(Moment(0, 5, 0, moved, torch.optim.SGD(list(moved.values()), lr=1.0)))
    after = dict(hook.average.named_parameters())
    for name in moved:
        torch.testing.assert_close(after[name], before[name] + 1.0)


def replace_weight(weight: float):
    return Trajectory(levels=8, width=32, teacher_steps=2, denoising_weight=weight).options


def test_the_bundle_is_told_where_to_jump(tmp_path) -> None:
    noise, labels = asked()
    gw.lower(student(), "onnxruntime").save(tmp_path)
    bundle, sampler = gw.load(tmp_path), Sampler.of(student())
    for settings in ({"steps": 1}, {"steps": 3, "solver_options": {"gamma": 0.5}, "seed": 4}):
        wanted = sampler.sample(noise, labels, **settings)
        found = bundle.sample(noise, labels, **settings)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    with pytest.raises(ArgumentError, match="heun is no solver of this denoiser"):
        bundle.sample(noise, labels, steps=2, solver="heun")
    with pytest.raises(ArgumentError, match="jump is no solver of this denoiser"):
        Sampler.of(planar.corrected()).sample(noise, labels, steps=2, solver="jump")


def test_a_killed_run_goes_on(tmp_path, monkeypatch) -> None:
    recipe = Trajectory(levels=5, width=8, tune={"steps": 5, "lr": 1e-3})
    given = {"training": planar.data(3, 16), "scope": ("test",)}
    straight = recipe.execute(planar.corrected(), Context(**given))
    whole = Jumping.on_loss

    def killed(self, at, *rest):
        if at.step == 3:
            raise KeyboardInterrupt
        return whole(self, at, *rest)

    work = Context(**given, work=tmp_path, checkpoint_seconds=0.0)
    monkeypatch.setattr(Jumping, "on_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.execute(planar.corrected(), work)
    monkeypatch.setattr(Jumping, "on_loss", whole)
    resumed = recipe.execute(planar.corrected(), work)
    assert resumed.metrics == straight.metrics
    for name, tensor in straight.program.state.items():
        assert torch.equal(resumed.program.state[name], tensor), name


def test_refusals() -> None:
    data = planar.data(1, 4)
    for options, said in (
        ({"scale_max": 2.0}, "scale_max has to be above scale_min"),
        ({"guidance_scale": 9.0}, "guidance_scale 9 is outside of 2 to 5"),
        ({"width": 15}, "the width of the waves is even"),
        ({"levels": 5, "teacher_steps": 5}, "more than the 5 levels have between them"),
    ):
        with pytest.raises(ArgumentError, match=said):
            Trajectory(**options)
    with pytest.raises(ModelError, match="no linear layer of this network sees the time alone"):
        Trajectory()(planar.otherwise(planar.corrected(), time=None), training=data)
    bare = planar.otherwise(planar.corrected(), conditions={"label": None})
    with pytest.raises(ModelError, match="no number stands for the lack of 'label'"):
        Trajectory()(bare, training=data)
    jumps = Trajectory(levels=4, tune={"steps": 1})(planar.corrected(), training=data)
    with pytest.raises(ModelError, match="this denoiser is told more"):
        GuidanceDistill()(jumps, training=data)
    with pytest.raises(ModelError, match=r"tune\.trajectory has put guidance around"):
        gw.passes.sample.Cfg()(jumps)
