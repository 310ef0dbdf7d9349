"""Unnormalized densities: the estimator against exact gradients, and known answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.tune.meco import Likelihood, Meco, fitted, likelihood, moved

CHAIN = ("energy", [("tune.meco", {"tune": {"epochs": 1, "lr": 0.001}})])


class Parabola(nn.Module):
    """a x - b x^2 / 2: a normal density with mean a / b and variance 1 / b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a * x - self.b * x.square() / 2).squeeze(1)


def parabola() -> gw.Program:
    return gw.trace(Parabola().eval(), (torch.randn(4, 1),), {"x": {0: "batch"}})


def samples(mean: float, deviation: float, count: int = 4096) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return mean + deviation * torch.randn(count, 1, generator=generator)


def test_with_the_exact_partition_function_the_gradient_is_exact() -> None:
    """Noise that goes through a finite space once: mean(w) is Z, and the gradient that of the
    negative log-likelihood."""
    torch.manual_seed(0)
    f = torch.randn(11, dtype=torch.float64, requires_grad=True)
    data = torch.tensor([0, 3, 3, 7])
    log_weights = f + math.log(11)  # q = 1 / 11
    log_mean = log_weights.logsumexp(0) - math.log(11)
    log_z = f.logsumexp(0).item()
    loss = likelihood(f[data], log_mean, log_z)
    exact = -f[data].mean() + f.logsumexp(0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(x, f, retain_graph=True)[0] for x in (loss, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    # with another u, the noise's part is that of mean(w) over u
    other = torch.autograd.grad(likelihood(f[data], log_mean, log_z + math.log(2)), f)[0]
    of_data = -torch.bincount(data, minlength=11).double() / 4
    torch.testing.assert_close(other - of_data, (wanted - of_data) / 2, rtol=1e-12, atol=1e-14)


def test_the_moving_estimate_is_an_average_and_never_overflows() -> None:
    assert moved(-math.inf, 2.0, 0.1) == 2.0
    assert moved(math.log(3), math.log(13), 0.1) == pytest.approx(math.log(4), rel=1e-12)
    assert moved(2000.0, 2001.0, 0.25) == pytest.approx(
        2000 + math.log(0.75 + 0.25 * math.e), rel=1e-12
    )


def test_noise_is_the_datas_normal_distribution() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 3) @ torch.randn(3, 3) + torch.tensor([1.0, -2, 3])
    noise = fitted(rows.reshape(500, 3, 1).split(100), 2.0, "tune.meco")
    wanted = 2 * np.cov(rows.double().numpy().T, bias=True)
    found = (noise.factor @ noise.factor.T).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    x, log_density = noise.drawn(64)
    exact = torch.distributions.MultivariateNormal(noise.mean, scale_tril=noise.factor)
    torch.testing.assert_close(log_density, exact.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean", [1e4, -1e7])
def test_data_far_from_zero_has_its_own_covariance(mean: float) -> None:
    rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = fitted((rows + mean).split(100), 2.0, "tune.meco")
    wanted = 2 * np.cov(rows.numpy().T, bias=True)
    np.testing.assert_allclose((noise.factor @ noise.factor.T).numpy(), wanted, atol=1e-5)
    torch.testing.assert_close(noise.mean, rows.mean(0) + mean, rtol=1e-12, atol=0)


def test_learns_a_normal_density_and_its_partition_function() -> None:
    data = samples(1.5, 0.6)
    tune = {"steps": 1000, "lr": 0.1, "optimizer": "adam"}
    result = Meco(targets=["a", "b"], tune=tune).execute(
        parabola(), Context(training=[(part,) for part in data.split(256)])
    )
    a, b = (result.program.state[name].item() for name in "ab")
    mean, variance = float(data.mean()), float(data.var(correction=0))
    assert b == pytest.approx(1 / variance, rel=0.05)
    assert a / b == pytest.approx(mean, rel=0.02)
    exact = math.log(2 * math.pi / b) / 2 + a**2 / b / 2
    assert result.metrics["log_partition"] == pytest.approx(exact, abs=0.1)
    assert result.metrics["effective_samples"] > 0.3
    assert result.warnings == ()
    entropy = math.log(2 * math.pi * math.e * variance) / 2
    assert result.metrics["last_loss"] == pytest.approx(entropy, abs=0.25)


class Far(nn.Module):
    """A narrow density far from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(30.0))

    def forward(self, x: Tensor) -> Tensor:
        return -((x - self.at).square() * 50).sum(1, keepdim=True)


def test_noise_that_does_not_reach_is_said() -> None:
    program = gw.trace(Far().eval(), (torch.randn(4, 1),), {"x": {0: "batch"}})
    result = Meco(targets=["at"], tune={"steps": 10, "lr": 1e-6}).execute(
        program, Context(training=[(samples(0, 1, 256),)])
    )
    (warning,) = result.warnings
    assert warning.startswith("in 10 of 10 batches fewer than 5% of the noise counted")
    assert result.metrics["effective_samples"] < 0.05


def test_the_estimate_goes_on_where_it_was() -> None:
    noise = fitted([samples(0, 1, 64)], 2.0, "tune.meco")
    first, second = (Likelihood(parabola(), noise, 0.1) for _ in range(2))
    first.log_partition, first.batches, first.poor, first.effective = 1.5, 7, 2, 3.5
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()


def test_the_estimate_is_that_of_the_values_that_are_kept() -> None:
    recipe = Likelihood(parabola(), fitted([samples(0, 1, 64)], 2.0, "tune.meco"), 0.1)
    recipe.log_partition = 1.5
    recipe.keep_best()
    recipe.log_partition = 4.0
    recipe.restore_best()
    assert recipe.log_partition == 1.5


SPEC = """
version: 1
training: {data: train.npz, batch_size: 64}
passes:
  - tune.meco: {targets: [a, b], tune: {epochs: 10, lr: 0.1}}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    parabola().save(tmp_path / "net.pt2")
    np.savez(tmp_path / "train.npz", x=samples(1.5, 0.6, 512).numpy())
    (tmp_path / "spec.yaml").write_text(SPEC)
    found = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    metrics = found.report["passes"][0]["metrics"]
    assert metrics["last_loss"] < metrics["first_loss"]
    assert math.isfinite(metrics["log_partition"])


def test_what_cannot_be_right_is_refused() -> None:
    x = torch.randn(8, 3)
    wide = gw.trace(nn.Linear(3, 2).eval(), (x,), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match="wants one number per sample, and the output is"):
        Meco()(wide, training=[(x,)])
    ids = torch.randint(5, (6, 2))
    table = nn.Sequential(nn.Embedding(5, 1), nn.Flatten(), nn.Linear(2, 1)).eval()
    with pytest.raises(ModelError, match="one floating-point input"):
        Meco()(gw.trace(table, (ids,), {"input": {0: "batch"}}), training=[(ids,)])
    with pytest.raises(ArgumentError, match="all samples of the training data are alike"):
        Meco()(parabola(), training=[(torch.ones(8, 1),)])
    with pytest.raises(ArgumentError, match="1 samples are too few"):
        Meco()(parabola(), training=[(torch.ones(1, 1),)])
    with pytest.raises(ArgumentError, match="inflation"):
        Meco(inflation=0.5)
