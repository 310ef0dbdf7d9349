"""sample.linear_guidance: exact histories are recovered, trajectories counted, fits bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.linear import LinearFit, default_policy, estimated, regressors
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.linear_guidance", {"steps": 4, "trajectories": 2})])
GIVEN = {"label": torch.tensor([0, 1, 2, 2])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.labelled()


def noise() -> torch.Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def linear(denoiser: gw.Program, **options: Any) -> gw.Program:
    given = {"guidance_scale": 2.0, "steps": 8, "trajectories": 64, **options}
    return gw.passes.sample.LinearGuidance(**given)(denoiser)


def test_exact_histories_are_recovered() -> None:
    g = torch.Generator().manual_seed(0)
    true = torch.tensor([0.3, -0.2, 0.5, 0.7, -0.4], dtype=torch.float64)
    fit = LinearFit(5)
    for _ in range(3):
        withs = [torch.randn(4, 3, 3, generator=g) for _ in range(3)]
        withouts = [torch.randn(4, 3, 3, generator=g) for _ in range(2)]
        parts = regressors(withs, withouts)
        fit.add(parts, estimated(true.tolist(), [p.double() for p in parts]))
    assert float((fit.solved() - true).abs().max()) < 1e-6
    assert fit.residual(fit.solved()) < 1e-6
    reuse = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert fit.residual(reuse) > 0.1


def test_a_singular_history_gets_a_ridge() -> None:
    fit, x = LinearFit(3), torch.randn(8)
    fit.add([x, x, 2 * x], 3 * x)
    found = fit.solved()
    assert bool(found.isfinite().all())
    assert fit.residual(found) < 1e-4


def test_all_full_is_cfg_and_the_policy_counts(denoiser: gw.Program) -> None:
    full = Sampler.of(linear(denoiser, policy=["full"] * 8))
    cfg = Sampler.of(gw.passes.sample.Cfg(guidance_scale=2.0)(denoiser))
    found = [s.sample(noise(), GIVEN, steps=8) for s in (full, cfg)]
    assert torch.equal(*found)
    assert default_policy(8) == ["full", "linear", "full", "linear", *["conditioned"] * 4]
    mine = Sampler.of(linear(denoiser))
    mine.sample(noise(), GIVEN, steps=8)
    assert mine.evaluations == 2 + 1 + 2 + 1 + 4


def test_the_fit_is_nearer_to_cfg_than_the_condition_alone(denoiser: gw.Program) -> None:
    policy = ["full", "full", "linear", "linear", "full", "linear", "full", "full"]
    program = linear(denoiser, policy=policy)
    cfg = Sampler.of(gw.passes.sample.Cfg(guidance_scale=2.0)(denoiser))
    wanted = cfg.sample(noise(), GIVEN, steps=8)
    mine = Sampler.of(program).sample(noise(), GIVEN, steps=8)
    scales = [1.0 if kind == "linear" else 2.0 for kind in policy]
    without = cfg.sample(noise(), GIVEN, steps=8, guidance_scale=scales)
    assert float((mine - wanted).norm()) < 0.5 * float((without - wanted).norm())


def test_the_fit_is_nearer_than_the_last_prediction_on_new_noise(denoiser: gw.Program) -> None:
    program = linear(denoiser, policy=["full"] * 8)
    sampler = Sampler.of(program)
    assert sampler.record.guidance is not None
    coefficients = sampler.record.guidance.settings["linear"]["coefficients"]
    given = {"label": torch.arange(64) % 3}
    plan = sampler.plan(64, given, steps=8)
    x = sampler.first(plan, torch.randn(64, 2, generator=torch.Generator().manual_seed(9)))
    state, seen = {}, []
    for i in range(8):
        x, state = sampler.step(plan, i, x, state, watch=seen.append)
    withs, withouts = ([out[f"noise_{kind}"] for out in seen] for kind in ("with", "without"))
    fitted, last = [], []
    for i in range(1, 8):
        parts = regressors(withs[: i + 1], withouts[:i])
        fitted.append(float((estimated(coefficients[str(i)], parts) - withouts[i]).norm()))
        last.append(float((withouts[i - 1] - withouts[i]).norm()))
    assert all(a < b for a, b in zip(fitted, last, strict=True)), (fitted, last)


def test_coefficients_are_of_one_trajectory(denoiser: gw.Program) -> None:
    sampler = Sampler.of(linear(denoiser))
    for changes in ({"steps": 6}, {"solver": "dpmpp_2m"}, {"guidance_scale": 3.0},
                    {"grid": {"spacing": "karras"}}):  # fmt: skip
        with pytest.raises(ArgumentError, match=f"fitted with {next(iter(changes))} ="):
            sampler.sample(noise(), GIVEN, **{"steps": 8, **changes})
    with pytest.raises(ArgumentError, match="step 0 cannot be linear"):
        linear(denoiser, policy=["linear"] * 8)
    with pytest.raises(ArgumentError, match="policy has to name all 8 steps"):
        linear(denoiser, policy=["full"])
