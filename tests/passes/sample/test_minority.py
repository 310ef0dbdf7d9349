"""sample.minority: rare samples score high, the gradient in the graph is autograd's, refusals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import denoisers
from models.mixture import Mixture
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.precision import run_in_double
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.minority import (
    MinorityClassifier,
    gradient_graph,
    log_probability,
    minority_scores,
    quantile_labels,
)
from graphwright.ir.sampling.sampler import Sampler

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
SMALL = {"classes": 2, "width": 4, "depth": 1, "batch_size": 4, "tune": {"steps": 2}}
CHAIN = ("denoiser", [DENOISER, ("sample.minority", SMALL)])
BINS = 20
LOW, HIGH = 0.05, 10.0


@cache
def oracle(dtype: torch.dtype = torch.float64) -> Mixture:
    """Nineteen of twenty points on the left, the others on the right."""
    means = torch.tensor([[-0.5, 0.0], [1.5, 0.0]], dtype=dtype)
    weights = torch.tensor([0.95, 0.05], dtype=dtype)
    return Mixture(means, torch.tensor([0.09, 0.09], dtype=dtype), weights)


class Pair(nn.Module):
    """The exact noise of it."""

    def __init__(self) -> None:
        super().__init__()
        self.oracle = oracle(torch.float32)

    def forward(self, sample: Tensor, sigma_in: Tensor) -> Tensor:
        s = sigma_in[:, None]
        return (sample - self.oracle.denoised(sample, torch.ones_like(s), s)) / s


@cache
def points() -> Tensor:
    return oracle().sample(2000, torch.Generator().manual_seed(3)).float()


@cache
def guided() -> gw.Program:
    inputs = {"sample": torch.randn(3, 2), "sigma_in": torch.tensor([0.3, 1.0, 4.0])}
    free = {name: {0: "batch"} for name in inputs}
    program = gw.trace(Pair().eval(), inputs, free, ranges={"sigma_in": (0.1, HIGH)})
    schedule = {"kind": "edm", "sigma_min": LOW, "sigma_max": HIGH, "time": "sigma"}
    denoiser = gw.passes.sample.Denoiser(schedule=schedule, grid={"spacing": "log_snr"})(program)
    made = gw.passes.sample.Minority(
        classes=BINS, width=32, batch_size=64, tune={"steps": 300, "lr": 3e-3}
    )
    return made(denoiser, calibration=[{"sample": points()[:1000]}, {"sample": points()[1000:]}])


def test_the_score_is_the_mean_error_and_finds_what_is_rare() -> None:
    x = points().double()
    s = LOW * (HIGH / LOW) ** 0.6
    drawn: list[Tensor] = []

    def draw(size: torch.Size) -> Tensor:
        drawn.append(
            torch.randn(size, generator=torch.Generator().manual_seed(len(drawn))).double()
        )
        return drawn[-1]

    def denoise(noisy: Tensor, part: slice) -> Tensor:
        return oracle().denoised(noisy, torch.ones(len(noisy), 1), torch.full((len(noisy), 1), s))

    found = minority_scores(x, denoise, 1.0, s, 5, draw, rows=2000)
    for i in (0, 7, 1999):
        errors = [(x[i] - denoise(x[i : i + 1] + s * z[i : i + 1], slice(0))[0]) for z in drawn]
        right = sum(float((e[0] ** 2 + e[1] ** 2) / 2) for e in errors) / 5
        assert abs(float(found[i]) - right) < 1e-12
    rare = x[:, 0] > 0.5
    ranks = found.argsort().argsort().double()
    n1, n0 = int(rare.sum()), int((~rare).sum())
    area = (float(ranks[rare].sum()) - n1 * (n1 - 1) / 2) / (n1 * n0)
    assert area > 0.9


def test_bins_are_of_equal_size() -> None:
    g = torch.Generator().manual_seed(0)
    for scores in (torch.randn(103, generator=g), torch.zeros(103), torch.arange(103.0)):
        counts = quantile_labels(scores, 10).bincount(minlength=10)
        assert int(counts.max() - counts.min()) <= 1
    labels = quantile_labels(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2)
    assert labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("shape", [(3,), (2, 9), (2, 8, 7), (1, 4, 5, 6)])
def test_the_traced_gradient_is_autograds(shape: tuple[int, ...]) -> None:
    """In float64, for samples of every rank, at another batch than the traced one."""
    torch.manual_seed(0)
    net = MinorityClassifier(shape[0], len(shape) - 1, 5, 6, 2).double().eval()

    def drawn(rows: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, *shape, generator=g).double()
        levels = torch.rand(2, rows, generator=g).double() + 0.1
        return x, *levels, torch.tensor(3.0).double()

    traced = gradient_graph(net, shape)
    names = {str(n.target) for n in traced.graph.find_nodes(op="get_attr")}
    assert names <= set(net.state_dict())
    assert not any("backward" in str(node.target) for node in traced.graph.nodes)
    for rows in (1, 2, 5):
        x, a, s, target = drawn(rows)
        at = x.clone().requires_grad_()
        log_probability(net(at, a, s), target).backward()
        torch.testing.assert_close(traced(x, a, s, target), at.grad, rtol=1e-12, atol=1e-14)
        own = net(x, a, s).log_softmax(1)[:, 3].sum()
        torch.testing.assert_close(log_probability(net(x, a, s), target), own)
    assert all(parameter.requires_grad for parameter in net.parameters())


def by_autograd(program: gw.Program, inputs: tuple[Tensor, ...]) -> Tensor:
    """grad log p(target | x) of the classifier in a program."""
    x, _, alpha, sigma, _, target = (t.double() if t.is_floating_point() else t for t in inputs)
    net = MinorityClassifier(2, 0, BINS, 32, 2).double()
    state = {n.removeprefix("sample.minority."): t for n, t in program.state.items()}
    net.load_state_dict({n: t for n, t in state.items() if n in net.state_dict()})
    at = x.clone().requires_grad_()
    net(at, alpha, sigma).log_softmax(1)[:, int(target)].sum().backward()
    assert at.grad is not None
    return at.grad


def test_the_program_adds_the_gradient(tmp_path: Path) -> None:
    """In float64 to rounding, and in ONNX Runtime to that of float32."""
    gw.lower(guided(), "onnxruntime").save(tmp_path)
    bundle = gw.load(tmp_path)
    for rows in (1, 2, 5):
        g = torch.Generator().manual_seed(rows)
        s = torch.rand(rows, generator=g) + 0.3
        x = torch.randn(rows, 2, generator=g) * s[:, None]
        inputs = (x, s, torch.ones(rows), s, torch.tensor(2.0), torch.tensor(19.0))
        gradient = by_autograd(guided(), inputs)
        column = s.double()[:, None]
        data = oracle().denoised(x.double(), torch.ones_like(column), column)
        wide, noise = run_in_double(guided(), inputs)
        # float32 numbers of the mixture stand in the program
        torch.testing.assert_close(wide, data + 2 * column**2 * gradient, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.double(), wide + column * noise, rtol=1e-10, atol=1e-10)
        plain = run_in_double(guided(), (*inputs[:4], torch.tensor(0.0), torch.tensor(19.0)))[0]
        torch.testing.assert_close(
            (wide - plain) / (2 * column**2), gradient, rtol=1e-8, atol=1e-10
        )
        mine = bundle.run_flat(inputs)[0]
        torch.testing.assert_close(mine.double(), wide, rtol=1e-4, atol=1e-4)


def test_the_rare_side_is_sampled_more_often(tmp_path: Path) -> None:
    sampler = Sampler.of(guided())
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    shares = []
    for scale in (0.0, 1.0, 4.0):
        made = sampler.sample(z, steps=12, guidance_scale=scale)
        assert sampler.evaluations == 12
        shares.append(float((made[:, 0] > 0.5).double().mean()))
    assert shares[0] < 0.12
    assert shares[0] + 0.05 < shares[1] < shares[2], shares
    usual = sampler.sample(z, steps=12, guidance_scale=4.0, target_class=0)
    assert float((usual[:, 0] > 0.5).double().mean()) <= shares[0]


SPEC = """
version: 1
calibration: {data: data.npz, batch_size: 20}
passes:
  - sample.denoiser: {unconditional: {label: 4}, grid: {spacing: leading}}
  - sample.minority: {classes: 3, width: 8, batch_size: 8, tune: {steps: 5}}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        sample=g.standard_normal((40, 2, 8, 8)).astype(np.float32),
        timestep=np.zeros(40, np.float32),
        label=np.arange(40) % 4,
    )
    denoisers.conv().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    z = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"label": torch.tensor([0, 1, 3])}
    mine = bundle.sample(z, given, steps=4, guidance_scale=[2.0, 2.0, 1.0, 1.0])
    assert bundle.sampler.evaluations == 4
    wanted = Sampler.of(done.program).sample(z, given, steps=4, guidance_scale=[2.0, 2.0, 1.0, 1.0])
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)


def test_refusals() -> None:
    denoiser = denoisers.conv_denoiser()

    def asked(**changes: Any) -> gw.Program:
        data = {"sample": torch.randn(40, 2, 8, 8), "label": torch.arange(40) % 4}
        calibration = [changes.pop("data", data)]
        made = gw.passes.sample.Minority(**{**SMALL, **changes})
        return made(changes.pop("program", denoiser), calibration=calibration)

    with pytest.raises(ModelError, match="5 bins for 40 samples, and a bin needs 10"):
        asked(classes=5)
    with pytest.raises(ModelError, match="the calibration data lacks 'label'"):
        asked(data={"sample": torch.randn(40, 2, 8, 8)})
    with pytest.raises(ArgumentError, match="target_class 2 is not below classes 2"):
        asked(target_class=2)
    with pytest.raises(ArgumentError, match="trained with cross_entropy"):
        asked(tune={"steps": 2, "loss": "mse"})
    with pytest.raises(ModelError, match=r"sample\.cfg has put guidance around"):
        gw.passes.sample.Minority(**SMALL)(
            gw.passes.sample.Cfg()(denoiser), calibration=[{"sample": torch.randn(40, 2, 8, 8)}]
        )
    sampler = Sampler.of(guided())
    for wrong in (20.0, -1.0, 2.5):
        with pytest.raises(ArgumentError, match=r"target_class is a whole number from 0 to 19"):
            sampler.plan(3, steps=4, target_class=wrong)
