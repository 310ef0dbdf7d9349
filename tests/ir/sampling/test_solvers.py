"""Solvers on the analytic mixture: order of convergence, parameterizations, likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models.mixture import Mixture, mixture

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.ode import bits_per_dimension, flow_ode, likelihood
from graphwright.ir.sampling.parameterization import NAMES
from graphwright.ir.sampling.schedule import Level, NoiseSchedule
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.solvers.table import SOLVERS, make_solver
from graphwright.ir.sampling.trajectory import draw_noise, trajectory

VP = NoiseSchedule(kind="vp")
EDM = NoiseSchedule(kind="edm", sigma_max=10.0, sigma_min=0.05)


@pytest.fixture(scope="module")
def oracle() -> Mixture:
    return mixture()


def start(n: int = 16, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return scale * torch.randn(n, 2, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [VP, EDM], ids=lambda s: s.kind)
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("dpmpp_2m", 2),
        ("dpmpp_2s", 2),
        ("dpmpp_singlestep", 2),
        ("unipc", 2),
    ],
)
def test_order_of_convergence(
    oracle: Mixture, schedule: NoiseSchedule, name: str, order: int
) -> None:
    ends = (0.9, 0.05) if schedule.kind == "vp" else (10.0, 0.05)
    grid = Grid(spacing="log_snr", start=ends[0], end=ends[1], final="none")
    x = start(scale=schedule.level(ends[0]).s)
    exact = flow_ode(oracle.asked("x0"), schedule, x, *ends, rtol=1e-10, atol=1e-10).x
    steps = (64, 128, 256)
    errors = []
    for n in steps:
        path = Path(schedule, grid.levels(schedule, n))
        made = trajectory(oracle.asked("x0"), x, path, make_solver(name))
        errors.append(float((made - exact).norm()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.2 < slope < order + 1.2, (slope, errors)
    assert errors[-1] < (0.05 if order == 1 else 0.005)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"ddim"}))
def test_all_parameterizations_walk_one_trajectory(oracle: Mixture, name: str) -> None:
    solver = make_solver(name)
    for kind in NAMES:
        schedule = {"flow": NoiseSchedule(kind="flow"), "edm": EDM}.get(kind, VP)
        high = 10.0 if schedule.kind == "edm" else 0.9
        grid = Grid(spacing="log_snr", start=high, end=0.06, final="none")
        path = Path(schedule, grid.levels(schedule, 8))
        x = start(4).float()
        noise = draw_noise(x, 8, solver, seed=3)
        single = mixture(torch.float32)
        made = trajectory(single.asked(kind), x, path, solver, noise)
        wanted = trajectory(oracle.asked("x0"), x.double(), path, solver,
                            [z.double() for z in noise])  # fmt: skip
        assert float((made - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max())), kind


def test_edm_and_vp_are_one_ode_under_a_change_of_variables(oracle: Mixture) -> None:
    ends = (0.8, 0.1)
    vp_path = Path(VP, Grid(spacing="log_snr", start=0.8, end=0.1, final="none").levels(VP, 20))
    first, last = (VP.level(t).sigma for t in ends)
    grid = Grid(spacing="log_snr", start=first, end=last, final="none")
    edm_path = Path(EDM, grid.levels(EDM, 20))
    x = start(8)
    for name in ("euler", "heun", "dpmpp_2m", "dpmpp_2s", "unipc"):
        one = trajectory(oracle.asked("epsilon"), x, vp_path, make_solver(name))
        other = trajectory(oracle.asked("edm"), x / VP.level(0.8).a, edm_path, make_solver(name))
        torch.testing.assert_close(one / VP.level(0.1).a, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["reverse_sde", "predictor_corrector", "euler_ancestral"])
def test_stochastic_solvers_sample_the_mixture(oracle: Mixture, name: str) -> None:
    solver = make_solver(name)
    grid = Grid(spacing="uniform", start=1.0, end=1e-3, final="none")
    path = Path(VP, grid.levels(VP, 150))
    x = start(3000)
    made = trajectory(oracle.asked("epsilon"), x, path, solver, draw_noise(x, 150, solver, 5))
    mean = (oracle.weights[:, None] * oracle.means).sum(0)
    # standard error of the mean is 0.02
    assert float((made.mean(0) - mean).abs().max()) < 0.08
    near = (made[:, None] - oracle.means).norm(dim=-1).argmin(1)
    share = torch.bincount(near, minlength=3) / len(made)
    assert float((share - oracle.weights).abs().max()) < 0.04


@pytest.mark.parametrize("schedule", ["vp", "subvp", "ve"])
def test_likelihood_is_that_of_the_closed_form(schedule: str) -> None:
    chosen = NoiseSchedule(kind=schedule, sigma_min=0.01, sigma_max=50.0)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    gaussian = Mixture(
        torch.full((1, 3), 0.3, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
    )  # fmt: skip
    x = gaussian.sample(6, g)
    basis = 3**0.5 * torch.eye(3, dtype=torch.float64)[:, None, :].expand(3, 6, 3)
    found = likelihood(gaussian.asked("x0"), chosen, x, basis, 1e-3, 1.0)
    wanted = gaussian.log_prob(x, *chosen.coefficients(1e-3))
    # at t = 1 the data has not quite vanished from the noise
    torch.testing.assert_close(found.log_likelihood, wanted, rtol=0, atol=0.03)
    signs = torch.randint(0, 2, (1, 6, 3), generator=g).double() * 2 - 1
    random = likelihood(gaussian.asked("x0"), chosen, x, signs, 1e-3, 1.0)
    # the Jacobian is a multiple of the unit matrix, on which any signs give its trace
    torch.testing.assert_close(random.log_likelihood, found.log_likelihood, rtol=0, atol=1e-4)
    assert bits_per_dimension(torch.tensor([0.0]), 3).item() == 7.0


def test_codes_of_samples_come_back(oracle: Mixture) -> None:
    x = start(5)
    code = flow_ode(oracle.asked("v"), VP, x, 1e-3, 1.0, rtol=1e-7, atol=1e-7).x
    back = flow_ode(oracle.asked("v"), VP, code, 1.0, 1e-3, rtol=1e-7, atol=1e-7).x
    assert float((back - x).abs().max()) < 1e-4


def test_refusals(oracle: Mixture) -> None:
    flow = NoiseSchedule(kind="flow")
    path = Path(flow, Grid(spacing="uniform", end=0.1).levels(flow, 3))
    denoise = oracle.asked("flow")
    for name in ("heun", "unipc"):
        with pytest.raises(ArgumentError, match=f"{name} goes by s / a, which is infinite"):
            trajectory(denoise, start(2), path, make_solver(name))
    with pytest.raises(ArgumentError, match="3 tensors of noise, and 0 are given"):
        trajectory(denoise, start(2), path, make_solver("lcm"))
    with pytest.raises(ArgumentError, match=r"noise 0 has the shape \(3, 2\)"):
        trajectory(denoise, start(2), path, make_solver("lcm"), [start(3)] * 3)
    with pytest.raises(ArgumentError, match="no solver named 'ode'"):
        make_solver("ode")
    with pytest.raises(ArgumentError, match="solver euler: eta"):
        make_solver("euler", eta=2.0)
    with pytest.raises(ArgumentError, match="a table has no derivatives"):
        flow_ode(denoise, NoiseSchedule(), start(2), 0.5, 0.1)
    with pytest.raises(ArgumentError, match="at t = 0 there is no noise"):
        flow_ode(denoise, flow, start(2), 0.5, 0.0)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2s"])
def test_two_directions_that_agree_change_nothing(oracle: Mixture, name: str) -> None:
    path = Path(VP, Grid(spacing="log_snr", start=0.9, end=0.1).levels(VP, 6))
    plain = oracle.asked("x0")

    def twice(x: torch.Tensor, level: object) -> Prediction:
        p = plain(x, level)
        return Prediction(p.denoised, (x - level.a * p.denoised) / level.s)

    x = start(4)
    one, other = (trajectory(d, x, path, make_solver(name)) for d in (plain, twice))
    torch.testing.assert_close(one, other)
    assert math.isfinite(float(one.sum()))


@pytest.mark.parametrize("name", ["reverse_sde", "predictor_corrector", "unipc", "heun"])
def test_a_path_that_ends_or_begins_without_noise_or_signal(name: str) -> None:
    """The last asked level of `uniform` has no noise: the data is there already. VE's has some, and
    the step behind it goes to the data."""

    def standard_normal(x: torch.Tensor, level: Level) -> Prediction:
        square = level.a**2 + level.s**2
        return Prediction(level.a * x / square, level.s * x / square)

    solver = make_solver(name)
    for kind in ("vp", "ve"):
        schedule = NoiseSchedule(kind=kind, sigma_min=0.5, sigma_max=5.0)
        levels = Grid(spacing="uniform").levels(schedule, 3)
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = draw_noise(x, 1, solver, 0)
        made = trajectory(standard_normal, x, Path(schedule, levels[2:]), solver, noise)
        if name != "predictor_corrector" or kind == "vp":
            level = levels[2]
            torch.testing.assert_close(made, level.a * x / (level.a**2 + level.s**2))
        assert torch.isfinite(made).all()
    flow = NoiseSchedule(kind="flow")
    path = Path(flow, Grid(spacing="uniform").levels(flow, 2))
    with pytest.raises(ArgumentError, match="infinite at the first level"):
        trajectory(standard_normal, x, path, solver, draw_noise(x, 2, solver, 0))
