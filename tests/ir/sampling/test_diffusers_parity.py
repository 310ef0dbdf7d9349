"""Step for step with the schedulers of diffusers, on one denoiser, from their own configuration."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from models.mixture import Mixture, mixture

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.diffusers import read_guider, read_scheduler
from graphwright.ir.sampling.parameterization import canonical, output_of
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Path, Prediction
from graphwright.ir.sampling.solvers.table import make_solver
from graphwright.ir.sampling.trajectory import trajectory

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
STEPS = 10
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**TABLE, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False},
    "DDPMScheduler": {**TABLE, "clip_sample": False, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": TABLE,
    "EulerAncestralDiscreteScheduler": TABLE,
    "HeunDiscreteScheduler": TABLE,
    "DPMSolverMultistepScheduler": TABLE,
    "DPMSolverSinglestepScheduler": TABLE,
    "UniPCMultistepScheduler": TABLE,
    "LCMScheduler": {**TABLE, "clip_sample": False},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
}


class Denoiser:
    """The mixture at any level, by the step that a network would be told."""

    def __init__(self, oracle: Mixture, schedule: Any, kind: str) -> None:
        self.oracle, self.schedule, self.kind = oracle, schedule, kind

    def out(self, x: torch.Tensor, t: float) -> torch.Tensor:
        level = self.schedule.level(t)
        a, s = (torch.full((len(x), 1), v, dtype=x.dtype) for v in (level.a, level.s))
        return output_of(self.kind, self.oracle.denoised(x, a, s), x, a, s)

    def __call__(self, x: torch.Tensor, level: Level) -> Prediction:
        out = self.out(x, level.time / self.schedule.time_scale)
        return Prediction(*canonical(self.kind, out, x, level.a, level.s))


def peer_steps(peer: Any, denoiser: Denoiser, x: torch.Tensor, noise: list[torch.Tensor]) -> Any:
    """Samples behind every step of a diffusers scheduler, in the scheduler's own coordinates."""
    scale = denoiser.schedule.time_scale
    drawn = iter(noise)
    module = sys.modules[type(peer).__module__]
    real = getattr(module, "randn_tensor", None)
    if real is not None:
        module.randn_tensor = lambda *a, **k: next(drawn)
    try:
        found = []
        for t in peer.timesteps:
            asked = peer.scale_model_input(x, t) if hasattr(peer, "scale_model_input") else x
            x = peer.step(denoiser.out(asked, float(t) / scale), t, x).prev_sample
            found.append(x)
    finally:
        if real is not None:
            module.randn_tensor = real
    return found


BY_SIGMA = [n for n in CASES if n.startswith(("EulerDiscrete", "Heun", "DPM", "UniPC"))]


@pytest.mark.parametrize("steps", [STEPS, 7])
@pytest.mark.parametrize("levels", ["karras", "exponential"])
@pytest.mark.parametrize("name", BY_SIGMA)
def test_levels_of_sigma(name: str, levels: str, steps: int) -> None:
    """Karras' and exponential levels, an even and an uneven number of them."""
    options = {**CASES[name], f"use_{levels}_sigmas": True}
    if name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        options["timestep_spacing"] = "leading"  # their ends are those of the table all the same
    assert worst_step(name, options, steps) < 1e-4


@pytest.mark.parametrize("steps", [STEPS, 7])
def test_uneven_steps_of_singlestep(steps: int) -> None:
    assert worst_step("DPMSolverSinglestepScheduler", TABLE, steps) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CASES)
def test_step_for_step(name: str, prediction: str) -> None:
    options = CASES[name]
    if not name.startswith("Flow"):
        options = {**options, "prediction_type": prediction}
    assert worst_step(name, options, STEPS) < 1e-4


def worst_step(name: str, options: dict[str, Any], steps: int) -> float:
    """Largest difference to a scheduler of diffusers behind any step."""
    flow = name.startswith("Flow")
    peer = getattr(diffusers, name)(**options)
    read = read_scheduler({**peer.config, "_class_name": name})
    path = Path(read.schedule, read.grid.levels(read.schedule, steps))
    solver = make_solver(read.solver, **read.options)
    denoiser = Denoiser(mixture(torch.float64), read.schedule, read.parameterization)
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(6, 2, generator=g, dtype=torch.float64) for _ in range(steps)]
    x = torch.randn(6, 2, generator=g, dtype=torch.float64)
    # Euler, its kin and Heun walk in x / a
    by_sigma = "Euler" in name or "Heun" in name
    divided = by_sigma and not flow
    peer.set_timesteps(steps)
    if "floored" in read.grid.told:
        # its logarithm of the first level is rounded to less than that of the last step
        assert int(peer.timesteps[0]) in (998, 999)
        peer.timesteps[0] = 999
    theirs = peer_steps(peer, denoiser, x / path.levels[0].a if divided else x, noise)
    if name == "HeunDiscreteScheduler":
        theirs = [*theirs[1::2], theirs[-1]]
    mine: list[torch.Tensor] = []
    used = noise[: steps * solver.draws]
    trajectory(denoiser, x, path, solver, used, watch=lambda i, made: mine.append(made))
    scales = [level.a if divided else 1.0 for level in path.levels[1:]]
    assert len(theirs) == len(mine) == steps
    return max(float((a * b - c).abs().max()) for a, b, c in zip(scales, theirs, mine, strict=True))


def test_grids_are_theirs() -> None:
    for name, options in CASES.items():
        peer = getattr(diffusers, name)(**options)
        read = read_scheduler({**peer.config, "_class_name": name})
        peer.set_timesteps(STEPS)
        times = peer.timesteps.double().numpy()
        times = times[[0, *range(1, len(times), 2)]] if "Heun" in name else times
        mine = [level.time for level in read.grid.levels(read.schedule, STEPS)[:-1]]
        assert np.allclose(times, mine, atol=1e-3), name


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_trailing_steps(name: str) -> None:
    """The levels of a spacing at equal strides; a linspace is left by both, and refused."""
    options = {**TABLE, "clip_sample": False, "timestep_spacing": "trailing"}
    assert worst_step(name, options, STEPS) < 1e-4
    config = {**options, "_class_name": name, "timestep_spacing": "linspace"}
    with pytest.raises(ArgumentError, match="leaves its own grid"):
        read_scheduler(config)


def test_guiders_are_theirs() -> None:
    from diffusers import guiders

    guider = guiders.ClassifierFreeGuidance(4.0, 0.3, start=0.1, stop=0.8)
    options = {"guidance_scale": 4.0, "guidance_rescale": 0.3, "start": 0.1, "stop": 0.8}
    assert read_guider(dict(guider.config, _class_name="ClassifierFreeGuidance")) == options
    other = guider.new(use_original_formulation=True, start=0.0, stop=1.0, guidance_rescale=0.0)
    found = read_guider(dict(other.config, _class_name="ClassifierFreeGuidance"))
    data, away = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = other.forward(data, away).pred
    torch.testing.assert_close(away + found["guidance_scale"] * (data - away), wanted)
    for name in ("AdaptiveProjectedGuidance", "ClassifierFreeZeroStarGuidance"):
        with pytest.raises(ArgumentError, match=f"no guider of ours computes the guider {name}"):
            read_guider(dict(getattr(guiders, name)().config, _class_name=name))
    with pytest.raises(ArgumentError, match="switched off"):
        read_guider({"_class_name": "ClassifierFreeGuidance", "enabled": False})


def test_what_our_solvers_do_not_compute_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no solver of ours computes the scheduler PNDM"):
        read_scheduler({"_class_name": "PNDMScheduler"})
    with pytest.raises(ArgumentError, match="clip_sample = True"):
        read_scheduler(dict(diffusers.DDIMScheduler().config, _class_name="DDIMScheduler"))
    euler = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    with pytest.raises(ArgumentError, match="of the spacing leading are not known"):
        read_scheduler({**euler, "timestep_spacing": "leading"})
    with pytest.raises(ArgumentError, match="both are asked for"):
        read_scheduler({**euler, "use_exponential_sigmas": True})
    for option, value in (("prediction_type", "flow"), ("timestep_spacing", "leading")):
        config = {**diffusers.DPMSolverMultistepScheduler().config, option: value}
        with pytest.raises(ArgumentError, match=value):
            read_scheduler({**config, "_class_name": "DPMSolverMultistepScheduler"})
