"""tune.ddo: the loss, its gradient at the reference, the weight of levels, one Gaussian for two."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import planar
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.parameterization import canonical
from graphwright.ir.sampling.record import DENOISED
from graphwright.ir.sampling.training import Training
from graphwright.passes.tune import Ddo
from graphwright.passes.tune.ddo import Against, ddo_loss, output_weight

DENOISER = (
    "sample.denoiser",
    {"parameterization": "v", "unconditional": {"label": 4}, "grid": {"spacing": "trailing"}},
)
SHORT = {"samples": 2, "steps": 1, "tune": {"steps": 2, "lr": 1e-3}}
CHAIN = ("denoiser", [DENOISER, ("tune.ddo", SHORT)])


def test_the_loss_is_that_of_the_paper() -> None:
    g = torch.Generator().manual_seed(0)
    data, fake = (torch.randn(50, generator=g, dtype=torch.float64) * 30 for _ in range(2))
    found = ddo_loss(data, fake, 3.0, 0.1)
    sigmoid = [1 / (1 + np.exp(-0.1 * d.numpy())) for d in (data, fake)]
    wanted = -np.log(sigmoid[0]).mean() - 3.0 * np.log(1 - sigmoid[1]).mean()
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_the_gradient_at_the_reference() -> None:
    """(1 + alpha) ln 2, and -(beta / 2) (grad E_data Delta - alpha grad E_fake Delta)."""
    data, fake = (torch.zeros(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = ddo_loss(data, fake, 2.5, 0.4)
    assert loss.item() == pytest.approx(3.5 * math.log(2), rel=1e-12)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (data, fake)), (-0.2 / 8, 2.5 * 0.2 / 8), strict=True
    ):
        torch.testing.assert_close(gradient, torch.full_like(gradient, wanted))


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "score", "flow", "edm"])
def test_a_level_weighs_as_the_networks_own_output(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    a, s = {"flow": (1 - t, t), "edm": (t / t, 5 * t)}.get(kind, (t, (1 - t * t).sqrt()))
    data = [canonical(kind, out, x, a, s, 0.7)[0] for out in (first, second)]
    program = planar.otherwise(planar.corrected(), parameterization=kind, sigma_data=0.7)
    weight = output_weight(Training(program, "test"), a, s)
    wanted = (first - second).square()
    torch.testing.assert_close(weight * (data[0] - data[1]).square(), wanted)


def test_delta_is_a_difference_of_losses_on_the_networks_own_output() -> None:
    program = planar.otherwise(planar.corrected(), parameterization="epsilon")
    fakes, g = planar.data(1, 5, seed=4)[0], torch.Generator().manual_seed(1)
    hook = Against(Training(program, "test"), Context(), program, fakes, alpha=2.0, beta=0.3)
    made = dict(hook.on_batch(SimpleNamespace(step=0, micro=0), planar.data(1, 4)[0]))
    own, other = (torch.randn(made["clean"].shape, generator=g) for _ in range(2))
    made["copy"] = made["clean"] + other
    outputs = {DENOISED: made["clean"] + own}
    found = hook.on_loss(SimpleNamespace(step=0, micro=0), torch.zeros(()), outputs, made)
    weight = (made["alpha"] / made["sigma"]).square()  # of the noise that epsilon is
    delta = (-weight * (own.square().sum(1) - other.square().sum(1))).double().numpy()
    sigmoid = 1 / (1 + np.exp(-0.3 * delta))
    wanted = -np.log(sigmoid[:4]).mean() - 2.0 * np.log(1 - sigmoid[4:]).mean()
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_both_networks_are_asked_at_the_same_noise() -> None:
    """Delta is zero before training, and the gradient of the recipe is the paper's identity."""
    program = planar.corrected()
    training = Training(program, "test")
    fakes = planar.data(1, 40, seed=4)[0]
    hook = Against(training, Context(), program, fakes, alpha=2.0, beta=0.3)
    at = SimpleNamespace(step=0, micro=0)
    made = hook.on_batch(at, planar.data(1, 30)[0])
    assert len(made["sample"]) == 60
    live = {n: nn.Parameter(p.detach().clone()) for n, p in program.trainable().items()}
    model = program.replace(state={**program.state, **live})
    outputs = model(*(made[spec.name] for spec in program.signature.inputs))
    assert torch.equal(outputs[DENOISED], made["copy"])
    loss = hook.on_loss(at, torch.zeros(()), outputs, made)
    assert float(loss.detach()) == pytest.approx(3 * math.log(2), rel=1e-6)
    names = list(live.values())
    found = torch.autograd.grad(loss, names, retain_graph=True, materialize_grads=True)
    delta = -(outputs[DENOISED] - made["clean"]).square().sum(1)  # of x0, with weight 1
    identity = -0.15 * (delta[:30].mean() - 2.0 * delta[30:].mean())
    wanted = torch.autograd.grad(identity, names, materialize_grads=True)
    scale = max(float(each.abs().max()) for each in wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


# ---- a family of one Gaussian, and data of two

PLACES, SPREADS, SHARES = np.array([0.0, 3.0]), np.array([0.5, 0.5]), np.array([0.8, 0.2])


class OneGaussian(nn.Module):
    """E[x0 | x] of N(mean, exp(log_var)), on levels of edm."""

    def __init__(self, mean: float, variance: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))
        self.log_var = nn.Parameter(torch.tensor([math.log(variance)]))

    def forward(self, x: Tensor, sigma_in: Tensor) -> Tensor:
        v, square = self.log_var.exp(), sigma_in[:, None] ** 2
        return (v * x + square * self.mean) / (v + square)


def one_gaussian(mean: float, variance: float) -> gw.Program:
    net = OneGaussian(mean, variance).eval()
    inputs = {"x": torch.randn(4, 1), "sigma_in": torch.tensor([0.1, 0.5, 1.0, 5.0])}
    program = gw.trace(net, inputs, {n: {0: "batch"} for n in inputs})
    schedule = {"kind": "edm", "sigma_min": 0.02, "sigma_max": 20.0, "time": "sigma"}
    made = gw.passes.sample.Denoiser(
        parameterization="x0", schedule=schedule, grid={"spacing": "karras"}
    )
    return made(program)


def of_gaussian(program: gw.Program) -> tuple[float, float]:
    return float(program.state["mean"].detach()), float(program.state["log_var"].detach().exp())


def reverse_kl(mean: float, variance: float) -> float:
    """KL(model || data), by a sum over a line."""
    x = np.linspace(mean - 8 * variance**0.5, mean + 8 * variance**0.5, 4001)
    model = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    each = np.exp(-((x[:, None] - PLACES) ** 2) / (2 * SPREADS**2)) / (SPREADS * np.sqrt(2 * np.pi))
    data = (each * SHARES).sum(1)
    return float((model * np.log(model / data)).sum() * (x[1] - x[0]))


def line(batches: int = 20, size: int = 256) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        second = (torch.rand(size, 1, generator=g) < SHARES[1]).float()
        made.append({"x": 3.0 * second + 0.5 * torch.randn(size, 1, generator=g)})
    return made


MEAN = float((PLACES * SHARES).sum())
VARIANCE = float((SHARES * (SPREADS**2 + PLACES**2)).sum() - MEAN**2)


TUNE = {"steps": 100, "lr": 2e-2}


def test_a_dispersed_model_is_sharpened() -> None:
    """Of the right mean and too wide: the reverse divergence falls by half and more.

    Where the likelihood of this family is at its largest both means of the gradient vanish, so that
    the single Gaussian of best likelihood stays where it is, between the modes.
    """
    wide = one_gaussian(MEAN, 4.0)
    made = Ddo(alpha=0.5, beta=0.5, rounds=2, samples=1024, steps=12, tune=TUNE)(
        wide, training=line()
    )
    assert reverse_kl(*of_gaussian(made)) < 0.5 * reverse_kl(*of_gaussian(wide))
    assert of_gaussian(made)[1] < 2.4


def test_without_fakes_it_raises_the_likelihood_of_data() -> None:
    start = one_gaussian(MEAN + 1, VARIANCE)
    made = Ddo(alpha=0.0, beta=0.5, samples=16, steps=2, tune={**TUNE, "steps": 150})(
        start, training=line()
    )
    assert abs(of_gaussian(made)[0] - MEAN) < 0.5


def test_options_and_refusals() -> None:
    for options in ({"beta": 0.0}, {"alpha": -1.0}, {"rounds": 0}, {"samples": 1}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            Ddo(**options)
    with pytest.raises(ArgumentError, match="training data"):
        Ddo()(planar.corrected())
