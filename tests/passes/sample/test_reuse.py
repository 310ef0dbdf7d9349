"""sample.reuse: the cut is right, exact when every step computes all, counted and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import denoisers

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.cost import cost
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.variants import variants

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.reuse", {"modules": ["middle", "up"]})])
DEEP = ["down", "norm", "middle", "up"]
GIVEN = {"label": torch.tensor([0, 1, 3])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.conv_denoiser(grid={"spacing": "leading"})


def noise() -> torch.Tensor:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("modules", [["up"], ["middle"], DEEP])
@pytest.mark.parametrize("guided", [False, True])
def test_the_rest_with_what_was_kept_is_the_whole(
    denoiser: gw.Program, modules: list[str], guided: bool
) -> None:
    program = gw.passes.sample.Cfg(stop=0.5)(denoiser) if guided else denoiser
    made = variants(gw.passes.sample.Reuse(modules=modules)(program))
    names = ["conditioned", "conditioned_shallow", "full", "full_shallow"]
    assert sorted(made) == (names if guided else names[2:])
    for name in ("full", "conditioned") if guided else ("full",):
        whole, rest = made[name], made[f"{name}_shallow"]
        found = whole(*whole.examples)
        given = dict(zip((s.name for s in whole.signature.inputs), whole.examples, strict=True))
        kept = {n: found[n] for n in found if n.startswith("cached")}
        wanted = {s.name for s in rest.signature.inputs}
        again = rest(**{n: t for n, t in {**given, **kept}.items() if n in wanted})
        for output in ("denoised", "noise"):
            torch.testing.assert_close(again[output], found[output], rtol=1e-5, atol=1e-5)
        assert cost(rest).macs < cost(whole).macs
    if modules == DEEP:
        assert not any("norm" in n for n in made["full_shallow"].state)


def test_every_step_fresh_is_the_denoiser_and_steps_are_counted(denoiser: gw.Program) -> None:
    plain = Sampler.of(denoiser).sample(noise(), GIVEN, steps=7)
    always = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, interval=1)(denoiser))
    assert torch.equal(always.sample(noise(), GIVEN, steps=7), plain)
    every = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, interval=3)(denoiser))
    near = every.sample(noise(), GIVEN, steps=7)
    assert every.calls == {"full": 3, "full_shallow": 4}
    assert 0 < float((near - plain).norm() / plain.norm()) < 0.5
    some = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, refresh=[0, 1, 5])(denoiser))
    some.sample(noise(), GIVEN, steps=7)
    assert some.calls == {"full": 3, "full_shallow": 4}


def test_a_step_without_guidance_takes_over_its_rows(denoiser: gw.Program) -> None:
    guided = gw.passes.sample.Cfg(guidance_scale=1.0, stop=0.5)(denoiser)
    late = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, refresh=[0])(guided))
    mine = late.sample(noise(), GIVEN, steps=6)
    assert late.calls == {"full": 1, "full_shallow": 2, "conditioned_shallow": 3}
    plain = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, refresh=[0])(denoiser))
    wanted = plain.sample(noise(), GIVEN, steps=6)
    # a scale of 1 is the prediction with the condition
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    early = gw.passes.sample.Cfg(guidance_scale=1.0, start=0.5)(denoiser)
    early_on = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, refresh=[0])(early))
    early_on.sample(noise(), GIVEN, steps=6)
    # the first guided step has no rows without the condition to take over
    assert early_on.calls == {
        "conditioned": 1, "conditioned_shallow": 2, "full": 1, "full_shallow": 2
    }  # fmt: skip


def test_guidance_that_ends_by_itself_hands_over_its_rows(denoiser: gw.Program) -> None:
    adaptive = gw.passes.sample.AdaptiveGuidance(guidance_scale=1.0, threshold=-1.1)(denoiser)
    ended = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, refresh=[0])(adaptive))
    mine = ended.sample(noise(), GIVEN, steps=5)
    assert ended.calls == {"full": 1, "conditioned_shallow": 4}
    plain = Sampler.of(gw.passes.sample.Reuse(modules=DEEP, refresh=[0])(denoiser))
    wanted = plain.sample(noise(), GIVEN, steps=5)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_a_bundle_reuses(denoiser: gw.Program, tmp_path: Path) -> None:
    program = gw.passes.sample.Reuse(modules=DEEP, interval=2)(denoiser)
    program = gw.passes.sample.Cfg(guidance_scale=2.0)(program)
    gw.lower(program, "onnxruntime").save(tmp_path)
    bundle = gw.load(tmp_path)
    mine = bundle.sample(noise(), GIVEN, steps=4)
    wanted = Sampler.of(program).sample(noise(), GIVEN, steps=4)
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)
    assert bundle.sampler.calls == {"full": 2, "full_shallow": 2}


def test_refusals(denoiser: gw.Program) -> None:
    with pytest.raises(ModelError, match="no module is named decoder"):
        gw.passes.sample.Reuse(modules=["decoder"])(denoiser)
    with pytest.raises(ArgumentError, match="refresh has to hold step 0"):
        gw.passes.sample.Reuse(modules=["up"], refresh=[1])
    with pytest.raises(ModelError, match="would compute as much as before"):
        gw.passes.sample.Reuse(modules=["label"])(denoiser)
