"""sample.apg: it is CFG where it should be, and the paper's algorithm everywhere else."""

from __future__ import annotations

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.sampling.guidance import Apg
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.apg", {"norm_threshold": 2.5})])


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.labelled()


def tensors(n: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 5, 5, generator=g, dtype=torch.float64) for _ in range(n)]


def guided(scale: float, eta: float, beta: float, bound: float, momentum=None):
    """The guider's (D, E, momentum) on random predictions."""
    data, other, x = tensors()
    a, s = torch.full((4,), 0.6).double(), torch.full((4,), 0.8).double()
    noises = [(x - 0.6 * d) / 0.8 for d in (data, other)]
    numbers = [torch.tensor(float(v)) for v in (scale, eta, beta, bound)]
    held = torch.zeros_like(x) if momentum is None else momentum
    return data, other, Apg()(data, other, *noises, x, a, s, *numbers, held)


def test_it_is_cfg(denoiser: gw.Program) -> None:
    apg = gw.passes.sample.Apg(guidance_scale=3.0, eta=1.0, momentum=0.0)(denoiser)
    cfg = gw.passes.sample.Cfg(guidance_scale=3.0)(denoiser)
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    given = {"label": torch.arange(6) % 3}
    one, other = (Sampler.of(p).sample(noise, given, steps=8) for p in (apg, cfg))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_update_is_orthogonal_and_bounded() -> None:
    data, _, (made, noise, _) = guided(5.0, 0.0, 0.0, 1.5)
    update = (made - data).flatten(1)
    along = (update * data.flatten(1)).sum(1) / (update.norm(dim=1) * data.flatten(1).norm(dim=1))
    assert float(along.abs().max()) < 1e-10
    assert float(update.norm(dim=1).max()) <= 4 * 1.5 + 1e-9
    torch.testing.assert_close(0.6 * made + 0.8 * noise, tensors()[2])


def test_momentum_is_the_sum_of_the_paper(denoiser: gw.Program) -> None:
    held, updates = None, []
    for _ in range(3):
        data, other, (_, _, held) = guided(3.0, 0.0, -0.5, 0.0, held)
        updates.append(data - other)
    wanted = updates[2] - 0.5 * updates[1] + 0.25 * updates[0]
    torch.testing.assert_close(held, wanted)
    sampler = Sampler.of(gw.passes.sample.Apg(stop=0.5, guidance_scale=2.0)(denoiser))
    plan = sampler.plan(2, {"label": torch.tensor([0, 1])}, steps=4)
    x, state, seen = torch.ones(2, 2), {}, []
    for i in range(4):
        x, state = sampler.step(plan, i, x, state)
        seen.append(state["carried.momentum"])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])  # held where nothing is guided
    assert torch.equal(seen[2], seen[3])


def test_it_is_the_function_of_diffusers_on_the_data() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    buffer, held = MomentumBuffer(-0.5), None
    for _ in range(3):
        data, other, (made, _, held) = guided(4.0, 0.3, -0.5, 2.0, held)
        wanted = normalized_guidance(data, other, 3.0, buffer, 0.3, 2.0, True)
        torch.testing.assert_close(made, wanted)
    # what diffusers' guider does by default is another formula once the update is changed
    changed = normalized_guidance(data, other, 4.0, None, 0.0, 2.0, False)
    assert float((changed - guided(4.0, 0.0, 0.0, 2.0)[2][0]).abs().max()) > 0.5


def test_the_data_is_not_the_noise() -> None:
    data, other, (made, _, _) = guided(4.0, 0.0, 0.0, 0.0)
    x = tensors()[2]
    noise, other_noise = ((x - 0.6 * d) / 0.8 for d in (data, other))
    ones = torch.ones(4, dtype=torch.float64)
    numbers = [torch.tensor(v) for v in (4.0, 0.0, 0.0, 0.0)]
    lazy, *_ = Apg()(noise, other_noise, data, other, x, ones, ones, *numbers, 0 * x)
    assert float(((x - 0.8 * lazy) / 0.6 - made).abs().max()) > 0.5


def test_state_goes_through_the_bundle(denoiser: gw.Program, tmp_path) -> None:
    program = gw.passes.sample.Apg(guidance_scale=3.0, norm_threshold=1.0, stop=0.6)(denoiser)
    gw.lower(program, "onnxruntime").save(tmp_path)
    bundle = gw.load(tmp_path)
    for rows in (1, 2, 5):
        noise = torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows))
        given = {"label": torch.arange(rows) % 3}
        mine = bundle.sample(noise, given, steps=6)
        wanted = Sampler.of(program).sample(noise, given, steps=6)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
