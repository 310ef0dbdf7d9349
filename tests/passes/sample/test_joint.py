"""sample.joint: schedules of two times, conditional and joint laws in closed form, a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import denoisers
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.joint import places
from graphwright.ir.sampling.sampler import Sampler

SIGMA_MAX = 20.0
DENOISER = {
    "schedule": {"kind": "edm", "sigma_min": 0.01, "sigma_max": SIGMA_MAX, "time": "sigma"},
    "grid": {"spacing": "karras"}, "solver": "dpmpp_2m", "unconditional": {"label": 1},
}  # fmt: skip
CHAIN = ("pair", [("sample.joint", {})])
RHO = denoisers.RHO
MAKE_IMAGE = [[(0, 1), (1, 1)]]


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return gw.passes.sample.Denoiser(**DENOISER)(gw.passes.sample.Joint()(denoisers.pair()))


def noise(rows: int) -> Tensor:
    return torch.randn(rows, 2, 1, generator=torch.Generator().manual_seed(0))


def labels(rows: int) -> dict[str, Tensor]:
    return {"label": torch.ones(rows, dtype=torch.int64)}


def test_schedules() -> None:
    assert places(MAKE_IMAGE, 3) == ((0, 3), (1, 3), (2, 3), (3, 3))
    assert places([[(1, 1), (0, 1)]], 2) == ((2, 0), (2, 1), (2, 2))
    assert places([[(0, 1), (0, 1)]], 2) == ((0, 0), (1, 1), (2, 2))
    # the condition stays at half of its noise while the image is begun, then both go on
    rough = [[(0, 0.5), (0.5, 0.5)], [(0.5, 1), (0.5, 1)]]
    assert places(rough, 4) == ((0, 2), (1, 2), (2, 2), (3, 3), (4, 4))
    # ranges of two lengths: every step moves a picture by one at most
    found = places([[(0, 1), (0.5, 1)]], 4)
    assert found == ((0, 2), (1, 2), (2, 3), (3, 3), (4, 4))


def test_the_image_of_a_condition_has_the_law_of_the_conditional(denoiser: gw.Program) -> None:
    sampler = Sampler.of(denoiser)
    rows = 64
    depth = torch.linspace(-2, 2, rows)[:, None]
    settings: dict[str, Any] = {"steps": 60, "known": {"depth": depth}}
    made = sampler.sample(noise(rows), labels(rows), task="image", **settings)
    assert torch.equal(made[:, 1], depth)
    # x | y is N(rho y, 1 - rho^2): the flow ends where its closed form says, up to the step size
    variance = 1 - RHO**2
    ends = (variance / (variance + SIGMA_MAX**2)) ** 0.5
    wanted = RHO * depth + ends * (SIGMA_MAX * noise(rows)[:, 0] - RHO * depth)
    assert float((made[:, 0] - wanted).abs().max()) < 0.03
    same = sampler.sample(noise(rows), labels(rows), task=MAKE_IMAGE, **settings)
    assert torch.equal(same, made)
    assert sampler.calls == {"full": 60}


def test_both_at_once_have_the_joint_law(denoiser: gw.Program) -> None:
    rows = 2000
    made = Sampler.of(denoiser).sample(noise(rows), labels(rows), steps=40)[:, :, 0]
    # 0.8 within 4 standard errors, (1 - rho^2) / sqrt(n)
    assert abs(float(torch.corrcoef(made.T)[0, 1]) - RHO) < 0.033
    assert float((made.var(0) - 1).abs().max()) < 0.13


def test_a_condition_that_stays_noisy_leads_less(denoiser: gw.Program) -> None:
    sampler, rows = Sampler.of(denoiser), 400
    depth = torch.full((rows, 1), 2.0)
    found = []
    for task in (MAKE_IMAGE, [[(0, 0.6), (0.6, 0.6)], [(0.6, 1), (0.6, 1)]]):
        made = sampler.sample(noise(rows), labels(rows), steps=30, task=task,
                              known={"depth": depth})  # fmt: skip
        found.append(float(made[:, 0].mean()))
    assert abs(found[0] - 1.6) < 0.1
    assert 0.1 < found[1] < found[0] - 0.1


SPEC = """
version: 1
passes:
  - sample.joint: {}
  - sample.denoiser:
      schedule: {kind: edm, sigma_min: 0.01, sigma_max: 20.0, time: sigma}
      grid: {spacing: karras}
      solver: dpmpp_2m
      unconditional: {label: 1}
  - sample.cfg: {guidance_scale: 1.5}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle(denoiser: gw.Program, tmp_path: Path) -> None:
    denoisers.pair().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    given = {"label": torch.tensor([0, 1, 0])}
    guided = Sampler.of(gw.passes.sample.Cfg(guidance_scale=1.5)(denoiser, check=False))
    image = torch.tensor([[0.5], [-1.0], [2.0]])
    for settings in ({}, {"task": "depth", "known": {"image": image}}):
        mine = bundle.sample(noise(3), given, steps=8, **settings)
        wanted = guided.sample(noise(3), given, steps=8, **settings)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(mine[:, 0], image)


def test_refusals(denoiser: gw.Program) -> None:
    for task, text in [
        ([], "has to end with both"),
        ([[(0, 1), (0, 0.5)]], "has to end with both"),
        ([[(0, 1)]], "a range for each of the two"),
        ([[(0.5, 0), (1, 1)]], "a range for each of the two"),
        ([[(0, 0.5), (1, 1)], [(0, 1), (1, 1)]], "begins at the steps .0, 4., and the one before"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            places(task, 4)
    sampler = Sampler.of(denoiser)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no picture is named 'edges'; there are image, depth", {"task": "edges"}),
        ("begins with the data of .'depth'., and given is that of none", {"task": "image"}),
        ("begins with the data of no picture", {"known": {"depth": torch.zeros(2, 1)}}),
        ("the data of 'depth' has the shape", {"task": "image",
                                               "known": {"depth": torch.zeros(3, 1)}}),
        ("heun asks more often", {"solver": "heun"}),
    ]  # fmt: skip
    for text, settings in cases:
        with pytest.raises(ArgumentError, match=text):
            sampler.sample(noise(2), labels(2), steps=4, **settings)
    with pytest.raises(ArgumentError, match="are for programs of sample"):
        Sampler.of(denoisers.conv_denoiser()).plan(1, labels(1), steps=2, task="image")
    with pytest.raises(ModelError, match="goes by lengths of a sample"):
        gw.passes.sample.Apg()(denoiser)
    joint = gw.passes.sample.Joint
    with pytest.raises(ModelError, match="a denoiser already"):
        joint()(denoiser)
    with pytest.raises(ModelError, match="two times as well"):
        joint()(denoisers.conv())
    with pytest.raises(ModelError, match="the times 'label' and 'depth_sigma' are int64"):
        joint(times=["label", "depth_sigma"])(denoisers.pair())
    with pytest.raises(ModelError, match="no input 'edges'"):
        joint(pictures=["image", "edges"])(denoisers.pair())

    class One(nn.Module):
        def forward(self, x: Tensor, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return x + y * s[:, None] * t[:, None]

    inputs = (torch.randn(2, 1), torch.randn(2, 1), torch.rand(2), torch.rand(2))
    free = {name: {0: "batch"} for name in "xyst"}
    with pytest.raises(ModelError, match="has to return an output"):
        joint()(gw.trace(One(), inputs, free))
