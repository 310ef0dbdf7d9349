"""Schedules, parameterizations and grids against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.parameterization import (
    NAMES,
    canonical,
    check_levels,
    check_pair,
    network_input,
    output_of,
)
from graphwright.ir.sampling.schedule import NoiseSchedule

CLOSED = [
    NoiseSchedule(kind="vp"),
    NoiseSchedule(kind="subvp"),
    NoiseSchedule(kind="ve", sigma_min=0.01, sigma_max=50.0),
    NoiseSchedule(kind="edm"),
    NoiseSchedule(kind="flow"),
]


@pytest.mark.parametrize("schedule", CLOSED, ids=lambda s: s.kind)
def test_closed_forms_invert_and_differentiate(schedule: NoiseSchedule) -> None:
    for t in (0.2, 0.5, 0.9):
        level = schedule.level(t)
        assert math.isclose(schedule.at_sigma(level.sigma).t, t, rel_tol=1e-9)
        h = 1e-6
        (a0, s0), (a1, s1) = schedule.coefficients(t - h), schedule.coefficients(t + h)
        slopes = ((a1 - a0) / (2 * h), (s1 - s0) / (2 * h))
        assert np.allclose(schedule.slopes(t), slopes, rtol=1e-6, atol=1e-8)


def test_vp_is_variance_preserving_and_sub_vp_has_the_squared_noise() -> None:
    vp, sub = CLOSED[0].level(0.3), CLOSED[1].level(0.3)
    assert math.isclose(vp.a**2 + vp.s**2, 1.0)
    assert math.isclose(sub.s, vp.s**2)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_are_those_of_diffusers(beta_schedule: str) -> None:
    from diffusers import DDIMScheduler

    peer = DDIMScheduler(beta_schedule=beta_schedule)
    mine = NoiseSchedule(beta_schedule=beta_schedule).alphas_cumprod()
    assert np.allclose(mine, peer.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", NAMES)
def test_a_parameterization_gives_back_data_and_noise(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    a, s = {"edm": (1.0, 2.5), "flow": (0.3, 0.7)}.get(kind, (0.6, 0.8))
    x = a * data + s * noise
    out = output_of(kind, data, x, a, s)
    written = {
        "epsilon": noise,
        "x0": data,
        "v": a * noise - s * data,
        "score": -noise / s,
        "flow": noise - data,
        # c_skip x + c_out F = D
        "edm": (data - 0.25 / (s**2 + 0.25) * x) * (s**2 + 0.25) ** 0.5 / (s * 0.5),
    }[kind]
    torch.testing.assert_close(out, written)
    found = canonical(kind, out, x, a, s)
    torch.testing.assert_close(found[0], data)
    torch.testing.assert_close(found[1], noise)


def test_the_raw_network_of_edm_reads_unit_variance() -> None:
    assert network_input("edm", 3.0, 2.0) == 3.0 / math.sqrt(4.25)
    assert network_input("v", 3.0, 2.0) == 3.0


def test_what_divides_by_zero_is_refused_when_the_levels_are_known() -> None:
    flow = NoiseSchedule(kind="flow")
    levels = Grid(spacing="uniform").levels(flow, 4)
    with pytest.raises(ArgumentError, match=r"step 0 has no signal .* epsilon"):
        check_levels("epsilon", levels[:-1])
    with pytest.raises(ArgumentError, match=r"step 3 has no noise .* x0"):
        check_levels("x0", levels[:-1])
    check_levels("v", levels[:-1])
    with pytest.raises(ArgumentError, match="a = 1 - t, not on vp"):
        check_pair("flow", CLOSED[0])
    with pytest.raises(ArgumentError, match="a = 1, not on flow"):
        check_pair("edm", flow)


def test_grids() -> None:
    karras = Grid(spacing="karras").levels(CLOSED[3], 5)
    i = np.arange(5) / 4
    wanted = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert np.allclose([level.s for level in karras], [*wanted, 0.0])
    assert karras[-1].a == 1.0
    even = Grid(spacing="log_snr", start=0.9, end=0.1, final="none").levels(CLOSED[0], 4)
    gaps = np.diff([level.log_snr for level in even])
    assert len(even) == 5
    assert np.allclose(gaps, gaps[0])
    with pytest.raises(ArgumentError, match="chooses steps of a table"):
        Grid().levels(CLOSED[0], 4)
    with pytest.raises(ArgumentError, match="at least one step"):
        Grid().levels(NoiseSchedule(), 0)
    with pytest.raises(ArgumentError, match="no place for noise of 0"):
        Grid(spacing="karras").levels(CLOSED[4], 4)


@pytest.mark.parametrize(
    ("grid", "schedule", "steps", "said"),
    [
        ({"spacing": "leading", "steps_offset": 1}, {}, 1000, "t = 1000 is not on the table"),
        ({"spacing": "leading", "steps_offset": -1}, {}, 4, "not on the table"),
        ({"spacing": "lcm"}, {"num_train_timesteps": 20}, 4, "original_steps of a table of 20"),
        ({"spacing": "lcm", "original_steps": 4}, {}, 8, "takes 8 of 4 original_steps"),
        ({"spacing": "multistep"}, {"num_train_timesteps": 6}, 6, "noise has to fall"),
        ({"spacing": "karras", "start": 10.0, "end": 900.0}, {}, 4, "noise has to fall"),
        ({"spacing": "karras", "start": 1500.5}, {}, 4, "not on the table"),
        ({"spacing": "uniform", "start": 1.5}, {"kind": "flow"}, 2, "the schedule from 0 to 1"),
        ({"spacing": "uniform"}, {"kind": "flow", "time": "c_noise"}, 2, "its time is inf"),
    ],
)
def test_a_grid_stays_on_the_schedule_and_falls(
    grid: dict[str, object], schedule: dict[str, object], steps: int, said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        Grid(**grid).levels(NoiseSchedule(**schedule), steps)  # type: ignore[arg-type]


def test_betas_are_shares() -> None:
    for betas in ((), (0.1,), (0.1, 1.5), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="trained_betas"):
            NoiseSchedule(trained_betas=betas)
    with pytest.raises(ValueError, match="beta_start"):
        NoiseSchedule(beta_start=2.0)
    assert NoiseSchedule(trained_betas=(0.1, 1.0)).level(1.0).a == 0.0  # zero signal at the end
