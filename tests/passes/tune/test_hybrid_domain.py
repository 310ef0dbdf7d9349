"""A generator that moves to where domains meet: subspaces, losses, and a closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models.generator import Generator, features
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.passes.tune._features.subspace import spanned
from graphwright.passes.tune.hybrid_domain import HybridDomain, approach

CHAIN = ("trunk", [("tune.hybrid_domain", {
    "encoder": "models.generator:of_three", "domains": ["models.generator:few_threes"],
    "tune": {"epochs": 1, "lr": 0.001},
})])  # fmt: skip


def axes(count: int, *kept: int, at: float = 0.0) -> Tensor:
    """References (2 len(kept), count) that span the axes `kept`, through `at` on all others."""
    rows = torch.full((2 * len(kept), count), at, dtype=torch.float64)
    for number, axis in enumerate(kept):
        rows[:, axis] = 0.0
        rows[2 * number, axis], rows[2 * number + 1, axis] = 1.0, -1.0
    return rows


def test_subspaces_are_those_of_least_squares() -> None:
    """Against the solution of the normal equations; references lie in their subspace."""
    torch.manual_seed(0)
    rows, x = torch.randn(4, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    found = spanned(torch.cat([rows, rows[:1]]))  # one of them twice
    assert found.basis.shape == (9, 3)
    assert found.residual(rows).abs().max() < 1e-12
    directions = (rows[1:] - rows[0]).numpy().T
    offsets = (x - rows[0]).numpy().T
    solution = np.linalg.lstsq(directions, offsets, rcond=None)[0]
    wanted = torch.from_numpy((offsets - directions @ solution).T)
    torch.testing.assert_close(found.residual(x), wanted, rtol=1e-9, atol=1e-11)
    projector = found.basis @ found.basis.mT
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-12)
    torch.testing.assert_close(projector, projector.mT, rtol=0, atol=1e-14)


def test_the_direction_is_that_of_the_perpendiculars() -> None:
    domains = [spanned(axes(5, 0, 1, at=2.0)), spanned(axes(5, 0, 2, at=2.0))]
    torch.manual_seed(0)
    before = torch.randn(6, 5, dtype=torch.float64)
    ahead = -sum(domain.residual(before) for domain in domains)
    distance, way = approach(before + 0.3 * ahead, before, domains)
    assert way < 1e-12
    wanted = sum(np.linalg.norm(d.residual(before + 0.3 * ahead), axis=1) for d in domains).mean()
    assert float(distance) == pytest.approx(wanted, rel=1e-12)
    assert float(approach(before - ahead, before, domains)[1]) == pytest.approx(2, rel=1e-12)
    assert float(approach(before, before, domains)[1]) == 0, "what has not moved has no direction"
    assert approach(torch.zeros(1, 5).double(), before[:1], [spanned(torch.zeros(2, 5))])[0] == 0


def save(folder: Path, **domains: Tensor) -> list[str]:
    for name, rows in domains.items():
        np.savez(folder / f"{name}.npz", images=rows.float().numpy())
    return [f"{name}.npz" for name in domains]


def test_a_linear_generator_reaches_the_nearest_point_that_both_domains_share(tmp_path) -> None:
    """Domains of orthogonal normals: the point is e minus both perpendiculars."""
    torch.manual_seed(0)
    net = nn.Linear(3, 5)
    program = gw.trace(net.eval(), (torch.randn(4, 3),), {"input": {0: "batch"}})
    rows = {"first": axes(5, 0, 1, 2, 3, at=2.0), "second": axes(5, 0, 1, 2, 4, at=-1.0)}
    z = torch.randn(64, 3)
    step = HybridDomain(
        encoder="models.generator:numbers", domains=save(tmp_path, **rows),
        tune={"steps": 400, "lr": 0.05, "optimizer": "adam"},
    )  # fmt: skip
    before = dict(program.state)
    result = step.execute(program, Context(training=[(z,)], folder=tmp_path))
    domains = [spanned(each) for each in rows.values()]
    start = net(z).detach()
    wanted = start - sum(domain.residual(start) for domain in domains)
    assert all(domain.residual(wanted).norm() < 1e-4 for domain in domains)
    found = result.program(z).detach()
    assert (found - wanted).norm() < 0.02 * (start - wanted).norm()
    assert result.metrics["last_distance"] < 0.02 * result.metrics["first_distance"]
    assert all(program.state[name] is tensor for name, tensor in before.items())


SPEC = """
version: 1
training: {data: latents.npz, batch_size: 16}
passes:
  - tune.hybrid_domain:
      encoder: models.generator:features
      domains: [a.npz, b.npz]
      tune: {steps: 60, lr: 0.01}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = gw.trace(Generator().eval(), (torch.randn(4, 4),), {"z": {0: "batch"}})
    program.save(tmp_path / "generator.pt2")
    np.savez(tmp_path / "latents.npz", z=torch.randn(64, 4).numpy())
    save(tmp_path, a=torch.randn(6, 10) + 1, b=torch.randn(6, 10) - 1)
    (tmp_path / "spec.yaml").write_text(SPEC)
    found = gw.optimize(tmp_path / "generator.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    metrics = found.report["passes"][0]["metrics"]
    assert metrics["last_distance"] < 0.8 * metrics["first_distance"]


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = gw.trace(Generator().eval(), (torch.randn(4, 4),), {"z": {0: "batch"}})
    context = Context(training=[(torch.randn(8, 4),)], folder=tmp_path)
    names = save(tmp_path, few=torch.randn(1, 10), many=torch.randn(12, 10))
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 10)), b=np.zeros((2, 10)))

    def run(encoder: str, *domains: str) -> None:
        HybridDomain(encoder=encoder, domains=list(domains)).execute(program, context)

    with pytest.raises(ArgumentError, match="a domain has two images or more"):
        run("models.generator:features", names[0])
    with pytest.raises(ArgumentError, match="a file with one array of images"):
        run("models.generator:features", "two.npz")
    with pytest.raises(ArgumentError, match="span all 10 numbers of an embedding"):
        run("models.generator:numbers", names[1])
    with pytest.raises(ArgumentError, match="the encoder does not take images of the shape"):
        run("models.generator:of_hidden", names[1])
    with pytest.raises(ArgumentError, match="gives no embeddings"):
        run("models.generator:flat_numbers", names[1])
    with pytest.raises(ArgumentError, match="domains"):
        HybridDomain(encoder="a:b", domains=[])
    assert features()(torch.zeros(1, 10)).shape == (1, 24)
