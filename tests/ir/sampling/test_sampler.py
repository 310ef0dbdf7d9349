"""The driver: one trajectory for programs, bundles and steps; what is refused before it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.trajectory import draw_noise

LABELS = {"label": torch.tensor([0, 1, 2, 1, 0])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.labelled()


@pytest.fixture(scope="module")
def guided(denoiser: gw.Program) -> gw.Program:
    return gw.passes.sample.Cfg(guidance_scale=2.0, stop=0.7)(denoiser)


def noise(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(2))


def test_steps_are_the_sample(guided: gw.Program) -> None:
    sampler = Sampler.of(guided)
    for solver in ("dpmpp_2m", "euler_ancestral"):
        plan = sampler.plan(5, LABELS, steps=6, solver=solver)
        fresh = draw_noise(noise(), 6, plan.solver, 4)
        whole = sampler.sample(noise(), LABELS, steps=6, solver=solver, step_noise=fresh)
        again = sampler.sample(noise(), LABELS, steps=6, solver=solver, seed=4)
        x, state = sampler.first(plan, noise()), {}
        for i in range(6):
            each = fresh[i * plan.solver.draws : (i + 1) * plan.solver.draws]
            x, state = sampler.step(plan, i, x, state, each)
        assert torch.equal(x, whole)
        assert torch.equal(again, whole)


def test_labels_lead_to_their_component(denoiser: gw.Program) -> None:
    found = Sampler.of(denoiser).sample(noise(), LABELS, steps=20, solver="dpmpp_2m")
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]])
    nearest = (found[:, None] - means).norm(dim=-1).argmin(1)
    assert torch.equal(nearest, LABELS["label"])


def test_guidance_in_a_part_of_the_trajectory(denoiser: gw.Program) -> None:
    part = Sampler.of(gw.passes.sample.Cfg(guidance_scale=3.0, start=0.2, stop=0.6)(denoiser))
    made = part.sample(noise(), LABELS, steps=10)
    assert part.evaluations == 4 * 2 + 6
    whole = Sampler.of(gw.passes.sample.Cfg(guidance_scale=3.0)(denoiser))
    scales = [3.0 if 2 <= i < 6 else 1.0 for i in range(10)]
    same = whole.sample(noise(), LABELS, steps=10, guidance_scale=scales)
    assert whole.evaluations == 20
    torch.testing.assert_close(made, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_a_bundle_samples_as_its_program(guided: gw.Program, tmp_path: Any, backend: str) -> None:
    gw.lower(guided, backend).save(tmp_path)
    bundle = gw.load(tmp_path)
    for rows in (1, 2, 5):
        given = {"label": LABELS["label"][:rows]}
        mine = bundle.sample(noise(rows), given, steps=5, solver="heun")
        wanted = Sampler.of(guided).sample(noise(rows), given, steps=5, solver="heun")
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_a_bundle_lie_on_disk_once(tmp_path: Any) -> None:
    program = gw.passes.sample.Cfg(stop=0.5)(denoisers.conv_denoiser())
    bundle = gw.lower(program, "onnxruntime")
    bundle.save(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["conditioned.onnx", "full.onnx", "program.json", "weights.bin"]
    large = [t for t in program.state.values() if t.numel() * t.element_size() >= 1024]
    stored = (tmp_path / "weights.bin").stat().st_size
    assert large
    assert stored < sum(-(-t.numel() * 4 // 4096) * 4096 for t in large) + 1
    again = gw.load(tmp_path)
    inputs = program.examples
    torch.testing.assert_close(again.run_flat(inputs), bundle.run_flat(inputs))


def test_what_does_not_fit_is_refused_before_the_first_step(guided: gw.Program) -> None:
    sampler = Sampler.of(guided)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("missing ..label", {"conditions": {}}),
        ("unknown ..text", {"conditions": {**LABELS, "text": noise()}}),
        ("has 5 rows, and the noise 3", {"noise": noise(3)}),
        ("no parameter named 'scale'", {"scale": 2.0}),
        ("guidance_scale has 2 values, and there are 4", {"guidance_scale": [1.0, 2.0]}),
        ("4 tensors in all", {"solver": "euler_ancestral"}),
        ("no solver named 'pndm'", {"solver": "pndm"}),
        ("at least one step", {"steps": 0}),
    ]
    for text, changes in cases:
        given = {"noise": noise(), "conditions": LABELS, "steps": 4, **changes}
        with pytest.raises(ArgumentError, match=text):
            sampler.sample(given.pop("noise"), given.pop("conditions"), **given)
        assert sampler.evaluations == 0, text
    plan = sampler.plan(5, LABELS, steps=4, solver="dpmpp_2m")
    with pytest.raises(ArgumentError, match="the batch is 2, and the trajectory"):
        sampler.step(plan, 0, noise(2), {})
    with pytest.raises(ArgumentError, match=r"state 'solver.last_denoised' has the shape \(3, 2\)"):
        sampler.step(plan, 1, noise(), {"solver.last_denoised": noise(3)})


def test_whole_steps(tmp_path: Any) -> None:
    import json

    config = {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    program = denoisers.conv()
    made = gw.passes.sample.Denoiser(
        scheduler=str(tmp_path / "scheduler_config.json"), unconditional={"label": 4}
    )(program)
    record = Sampler.of(made).record
    assert (record.parameterization, record.solver) == ("v", "ddim")
    assert record.default_grid.spacing == "leading"
    with pytest.raises(ModelError, match="a denoiser already"):
        gw.passes.sample.Denoiser()(made)
    with pytest.raises(ModelError, match="no input 'x'"):
        gw.passes.sample.Denoiser(sample="x")(program)
