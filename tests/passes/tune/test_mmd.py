"""tune.mmd: the unbiased estimate, gradients through a whole trajectory, a number of steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import planar
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.grid import Grid
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.training import Training
from graphwright.passes.tune import Mmd
from graphwright.passes.tune._denoisers.discrepancy import mmd2
from graphwright.passes.tune.mmd import Unrolled, features_of

DENOISER = (
    "sample.denoiser",
    {"parameterization": "v", "unconditional": {"label": 4}, "grid": {"spacing": "trailing"}},
)
CHAIN = ("denoiser", [DENOISER, ("tune.mmd", {"steps": 2, "tune": {"steps": 1, "lr": 1e-3}})])

KERNELS = {
    "cubic": lambda u, v: (sum(a * b for a, b in zip(u, v, strict=True)) / len(u) + 1) ** 3,
    "linear": lambda u, v: sum(a * b for a, b in zip(u, v, strict=True)),
    "rbf": lambda u, v: torch.exp(-sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / len(u)),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_estimate_is_the_double_sum(kernel: str) -> None:
    g = torch.Generator().manual_seed(0)
    m, k = 7, KERNELS[kernel]
    x, y = (torch.randn(m, 3, generator=g, dtype=torch.float64) + i for i in (0, 1))
    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
    between = sum(k(x[i], y[j]) for i in range(m) for j in range(m))
    wanted = within / (m * (m - 1)) - 2 * between / m**2
    torch.testing.assert_close(mmd2(x, y, kernel), wanted, rtol=1e-10, atol=1e-10)


def test_the_estimate_is_unbiased() -> None:
    g = torch.Generator().manual_seed(0)
    pairs = torch.randn(400, 2, 16, 3, generator=g, dtype=torch.float64)
    found = torch.stack([mmd2(x, y) for x, y in pairs])
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20
    assert 100 < int((found < 0).sum()) < 350
    apart = torch.stack([mmd2(x, y + 1) for x, y in pairs])
    assert float(apart.min()) > 0


def test_batches_of_one_sample_are_refused() -> None:
    data = [{name: x[:1] for name, x in batch.items()} for batch in planar.data(1, 4)]
    with pytest.raises(ArgumentError, match="2 samples or more in a batch, and there is 1"):
        Mmd(steps=1, tune={"steps": 1}).execute(planar.corrected(), Context(training=data))


def unrolled(recompute: bool, features) -> tuple[Unrolled, dict, Tensor]:
    """A hook, a batch of it, and its first noise."""
    training = Training(planar.corrected(), "test")
    path = training.path(Grid(spacing="karras"), 3)
    hook = Unrolled(training, Context(), path, features, "cubic", recompute)
    made = hook.on_batch(SimpleNamespace(step=0, micro=0), planar.data(1, 12)[0])
    return hook, made, made["sample"] / path.levels[0].s


def test_gradients_go_through_the_trajectory_of_the_sampler() -> None:
    """With what is computed anew and without; the end is that of the driver."""
    found = []
    ends: list[Tensor] = []

    def features(x: Tensor) -> Tensor:
        ends.append(x.detach())
        return x.double()

    program = planar.corrected()
    for recompute in (True, False):
        hook, batch, noise = unrolled(recompute, features)
        # away from the exact denoiser, whose correction has no gradient inside
        moved = {n: nn.Parameter(p.detach() + 0.02) for n, p in program.trainable().items()}
        names = [spec.name for spec in program.signature.inputs]
        model = program.replace(state={**program.state, **moved})
        outputs = model(*(batch[name] for name in names))
        at = SimpleNamespace(step=0, micro=0, parameters=moved)
        loss = hook.on_loss(at, torch.zeros(()), outputs, batch)
        found.append(torch.autograd.grad(loss, list(moved.values())))
        wanted = Sampler.of(model).sample(
            noise, {"label": batch["label"]}, steps=3, solver="ddim", grid={"spacing": "karras"}
        )
        torch.testing.assert_close(ends[-1], wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0])


def distance(program: gw.Program, steps: int) -> float:
    """MMD^2 of 600 samples to held-out data."""
    real = planar.data(1, 600, seed=7)[0]
    noise = torch.randn(600, 2, generator=torch.Generator().manual_seed(3))
    made = Sampler.of(program).sample(
        noise, {"label": real["label"]}, steps=steps, solver="ddim", grid=planar.GRID
    )
    return float(mmd2(made.double(), real["sample"].double()))


@pytest.mark.filterwarnings("ignore:this denoiser was trained:UserWarning")
def test_the_distance_to_held_out_data_falls_for_the_steps_it_is_for() -> None:
    tuned = Mmd(steps=2, tune={"steps": 60, "lr": 3e-3})(
        planar.corrected(), training=planar.data(8)
    )
    record = Denoiser.required(tuned, "test")
    assert (record.steps, record.solver) == (2, "ddim")
    before, after = (distance(p, 2) for p in (planar.corrected(), tuned))
    assert after < 0.5 * before
    # what it learned is for two steps: in many it was better before
    assert distance(tuned, 16) > distance(planar.corrected(), 16)


class Judge(nn.Module):
    """A network whose last layer reads features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_features_are_of_a_network_in_a_file(tmp_path) -> None:
    torch.manual_seed(0)
    net = Judge().eval()
    traced = gw.trace(net, (torch.randn(4, 2),), {"x": {0: "batch"}})
    x = torch.randn(6, 2)
    moved = ((x + 1) / 2).clamp(0, 1)
    for layer, unit, wanted in (
        ("last", True, torch.tanh(net.first(moved))), (None, True, net(moved)),
        (None, False, net(x)),
    ):  # fmt: skip
        found = features_of(traced, layer, unit=unit)(x)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), wanted.detach())
    traced.save(tmp_path / "judge.pt2")
    quick = {"steps": 1, "features": "judge.pt2", "tune": {"steps": 1}}
    context = Context(training=planar.data(1, 8), folder=tmp_path)
    assert Mmd(layer="last", **quick).execute(planar.corrected(), context).metrics["steps"] == 1
    with pytest.raises(ArgumentError, match=r"no layer 'head', but \['first', 'last'\]"):
        Mmd(layer="head", **quick).execute(planar.corrected(), context)
    planar.network().save(tmp_path / "judge.pt2")
    with pytest.raises(ArgumentError, match=r"judge\.pt2 has 3"):
        Mmd(**quick).execute(planar.corrected(), context)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="names a place in the network of `features`"):
        Mmd(layer="last")
    with pytest.raises(ArgumentError, match="unit has no part without `features`"):
        Mmd(unit=False)
    double = planar.otherwise(planar.corrected(), steps=2, solver="double_step")
    with pytest.raises(ArgumentError, match="sampled by double_step"):
        Mmd()(double, training=planar.data(1, 4))
