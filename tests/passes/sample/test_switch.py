"""sample.switch: the trajectory is that of two denoisers by hand, counted, in a bundle, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import denoisers
from models.shown_file import shown_file

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ContractError, ModelError
from graphwright.ir.sampling.sampler import Sampler

GIVEN = {"label": torch.tensor([0, 1, 3])}
NET = {"unconditional": {"label": 4}, "grid": {"spacing": "multistep"}}


def small() -> gw.Program:
    """A network half as wide, with weights of its own."""
    torch.manual_seed(1)
    program = denoisers.conv()
    net = denoisers.ConvDenoiser(width=4).eval()
    free = {name: {0: "batch"} for name in ("sample", "timestep", "label")}
    ranges = {"label": (0, 5), "timestep": (0, 1000)}
    return gw.trace(net, program.examples, free, ranges=ranges)


FILE = shown_file("small-denoiser.pt2", lambda path: small().save(path))
CHAIN = ("denoiser", [("sample.denoiser", NET), ("sample.switch", {"network": str(FILE)})])


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.conv_denoiser(**NET)


def noise() -> torch.Tensor:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def switched(program: gw.Program, check: bool = False, **options: Any) -> gw.Program:
    given = {"network": str(FILE), **options}
    return gw.passes.sample.Switch(**given)(program, check=check)


def by_hand(first: Sampler, second: Sampler, until: int, steps: int, **settings: Any) -> Any:
    """A trajectory whose steps are those of one sampler, then of the other, with one state."""
    plans = [s.plan(3, GIVEN, steps=steps, **settings) for s in (first, second)]
    x, state = first.first(plans[0], noise()), {}
    for i in range(steps):
        which = i >= until
        x, state = (first, second)[which].step(plans[which], i, x, state)
    return x


def test_a_trajectory_goes_through_both(denoiser: gw.Program) -> None:
    program = switched(denoiser, check=True, until=0.6)
    sampler = Sampler.of(program)
    assert sorted(sampler.parts) == ["full", "other_full"]
    other = Sampler.of(gw.passes.sample.Denoiser(**NET)(small()))
    for solver in ("dpmpp_2m", "heun"):
        mine = sampler.sample(noise(), GIVEN, steps=5, solver=solver)
        wanted = by_hand(other, Sampler.of(denoiser), 3, 5, solver=solver)
        assert float((mine - wanted).abs().max() / wanted.abs().max()) < 1e-4
    sampler.sample(noise(), GIVEN, steps=5, solver="dpmpp_2m")
    assert sampler.calls == {"other_full": 3, "full": 2}
    # no tensor of the one network is in the program of the other
    counts = [len(Sampler.of(p).parts["full"].signature.inputs) for p in (program, denoiser)]
    assert counts[0] == counts[1]


SPEC = """
version: 1
passes:
  - quantize.rtn: {{block: 16, targets: ["middle", "last"]}}
  - sample.denoiser: {{unconditional: {{label: 4}}, grid: {{spacing: multistep}}}}
  - sample.cfg: {{guidance_scale: 2.0, stop: 0.8}}
  - sample.switch: {{network: {file}, until: 0.4}}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle_of_two_networks(tmp_path: Path) -> None:
    denoisers.conv().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC.format(file=FILE))
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    mine = bundle.sample(noise(), GIVEN, steps=5, solver="dpmpp_2m")
    assert bundle.sampler.calls == {"other_full": 2, "full": 2, "conditioned": 1}
    assert bundle.sampler.evaluations == 4 * 2 + 1
    wanted = Sampler.of(done.program).sample(noise(), GIVEN, steps=5, solver="dpmpp_2m")
    assert float((mine - wanted).abs().max() / wanted.abs().max()) < 1e-3
    # the other network was guided by the same passes
    guided = gw.passes.sample.Cfg(guidance_scale=2.0, stop=0.8)
    other = guided(gw.passes.sample.Denoiser(**NET)(small()))
    x = noise()
    theirs = Sampler.of(other)
    plan = theirs.plan(3, GIVEN, steps=5, solver="dpmpp_2m")
    first, _ = theirs.step(plan, 0, theirs.first(plan, x), {})
    own = bundle.plan(3, GIVEN, steps=5, solver="dpmpp_2m")
    found, _ = bundle.step(own, 0, x, {})
    assert float((found - first).abs().max() / first.abs().max()) < 1e-3


def test_a_denoiser_of_another_parameterization(denoiser: gw.Program, tmp_path: Path) -> None:
    made = gw.passes.sample.Denoiser(**NET, parameterization="v")(small())
    made.save(tmp_path / "v.pt2")
    program = switched(denoiser, network=str(tmp_path / "v.pt2"))
    mine = Sampler.of(program).sample(noise(), GIVEN, steps=4)
    wanted = by_hand(Sampler.of(made), Sampler.of(denoiser), 2, 4)
    assert float((mine - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_what_reuse_kept_is_the_own_network_s(denoiser: gw.Program) -> None:
    reused = gw.passes.sample.Reuse(modules=["middle", "up"], refresh=[0])(denoiser)
    sampler = Sampler.of(switched(reused))
    sampler.sample(noise(), GIVEN, steps=6)
    # the first step of the own network has nothing to take over yet
    assert sampler.calls == {"other_full": 3, "full": 1, "full_shallow": 2}


def test_refusals(denoiser: gw.Program, tmp_path: Path) -> None:
    def refused(kind: Any, text: str, program: gw.Program = denoiser, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            switched(program, **options)

    refused(ArgumentError, "there is no file of the other network", network="nowhere.pt2")
    guided = gw.passes.sample.Cfg()(denoiser)
    guided.save(tmp_path / "guided.pt2")
    refused(
        ModelError, "guidance of the two denoisers differs", network=str(tmp_path / "guided.pt2")
    )
    edm = gw.passes.sample.Denoiser(schedule={"beta_end": 0.03}, **NET)(small())
    edm.save(tmp_path / "beta.pt2")
    refused(ModelError, "schedule of the two denoisers differs", network=str(tmp_path / "beta.pt2"))
    denoisers.conv(size=16).save(tmp_path / "large.pt2")
    refused(ModelError, r"the input 'sample' is float32 \('batch', 2, 8, 8\) here",
            network=str(tmp_path / "large.pt2"))  # fmt: skip


def test_a_wrong_merge_breaks_the_contract(
    denoiser: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.passes.sample import switch

    real = switch.run_in_double
    monkeypatch.setattr(switch, "run_in_double", lambda p, x: tuple(1.1 * t for t in real(p, x)))
    with pytest.raises(ContractError, match="the output 'switch_denoised' is off by"):
        switched(denoiser, check=True)
