"""Patches at annealed scales: the distribution, the sampling, and training on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune.hooks import Moment
from graphwright.passes.tune._images.patches import annealed, drawn_scales, sampled
from graphwright.passes.tune.patches import Patches, Schedule

CHAIN = ("restorer", [
    ("tune.patches", {"resolution": 6, "tune": {"epochs": 1, "lr": 0.001, "loss": "mse"}}),
])  # fmt: skip

FREE = {"x": {0: "batch", 2: "height", 3: "width"}}


@pytest.mark.parametrize("beta", [0.001, 0.8, 3.0])
def test_scales_are_of_the_beta_distribution(beta: float) -> None:
    """Against its mean and its quantiles: P(s <= q) = 1 - (1 - q)^beta."""
    torch.manual_seed(0)
    found = drawn_scales(20_000, 0.25, beta)
    assert found.min() >= 0.25
    assert found.max() <= 1
    assert float(found.mean()) == pytest.approx(0.25 + 0.75 / (1 + beta), abs=0.006)
    share = (found - 0.25) / 0.75
    for q in (0.2, 0.5, 0.9):
        wanted = 1 - (1 - q) ** beta
        assert float((share <= q).double().mean()) == pytest.approx(wanted, abs=0.015)
    assert (beta > 0.001) or float(found.mean()) > 0.99


def test_the_distribution_is_annealed_linearly() -> None:
    assert [annealed(t, 10, 0.001, 0.8) for t in (0, 10, 25)] == [0.001, 0.8, 0.8]
    assert annealed(5, 10, 0.0, 1.0) == 0.5
    assert annealed(0, 0, 0.001, 0.8) == 0.8


def test_the_whole_image_is_a_resize() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    found = sampled(image, torch.ones(2).double(), torch.zeros(2, 2).double(), 5)
    wanted = F.interpolate(image, (5, 5), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_ramp_stays_a_ramp_between_the_ends_of_the_patch() -> None:
    right = torch.linspace(0, 1, 33, dtype=torch.float64).expand(1, 1, 33, 33)
    scale, offset = torch.tensor([0.4]).double(), torch.tensor([[0.25, 0.5]]).double()
    across, down = (sampled(x, scale, offset, 9)[0, 0] for x in (right, right.mT))
    torch.testing.assert_close(across[0], torch.linspace(0.25, 0.65, 9).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(down[:, 0], torch.linspace(0.5, 0.9, 9).double(), rtol=0, atol=1e-7)
    assert (across == across[0]).all()


def moment(step: int) -> Moment:
    weight = nn.Parameter(torch.zeros(1))
    return Moment(step, 100, 0, {}, torch.optim.SGD([weight], 0.1))


def test_batches_are_cut_with_their_labels_and_grow_finer() -> None:
    torch.manual_seed(0)
    schedule = Schedule("x", 8, (0.001, 0.8), 0.4, 2)
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32)
    classes = torch.arange(64)
    early = schedule.on_batch(moment(0), {"x": ramp, "labels": 2 * ramp})
    torch.testing.assert_close(early["labels"], 2 * early["x"])
    assert early["x"].shape == (64, 1, 8, 8)

    def widths(batch) -> Tensor:
        return batch["x"][:, 0, 0, -1] - batch["x"][:, 0, 0, 0]

    late = schedule.on_batch(moment(99), {"x": ramp, "labels": classes})
    assert late["labels"] is classes
    assert widths(early).mean() > 0.95
    assert 0.5 < widths(late).mean() < 0.8
    assert widths(late).min() > 0.25 - 1e-3
    assert torch.equal(late["x"][::2], late["x"][1::2]), "two samples share a patch"
    assert len(set(widths(late).tolist())) > 25


class Enlarged(nn.Module):
    """y = a x + b, at every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


SPEC = """
version: 1
training: {data: train.npz, batch_size: 8}
passes:
  - tune.patches: {resolution: 8, tune: {steps: 150, lr: 0.2, optimizer: adam, loss: mse}}
lower: []
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    """What is learned on small patches is right on whole images."""
    torch.manual_seed(0)
    program = gw.trace(Enlarged().eval(), (torch.randn(2, 1, 16, 16),), FREE)
    program.save(tmp_path / "net.pt2")
    x = torch.rand(24, 1, 24, 24)
    np.savez(tmp_path / "train.npz", x=x.numpy(), labels=(0.5 - 2 * x).numpy())
    (tmp_path / "spec.yaml").write_text(SPEC)
    gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    tuned = gw.load(tmp_path / "out" / "program.pt2")
    torch.testing.assert_close(tuned(x), 0.5 - 2 * x, rtol=0, atol=0.05)


def test_what_cannot_be_right_is_refused() -> None:
    torch.manual_seed(0)
    program = gw.trace(Enlarged().eval(), (torch.randn(2, 1, 16, 16),), FREE)
    tune = {"steps": 1, "loss": "mse"}
    x = torch.rand(4, 1, 16, 16)
    with pytest.raises(ArgumentError, match="cuts square images, and these are 16 x 12"):
        Patches(resolution=8, tune=tune)(program, training=[(x[..., :12], x[..., :12])])
    with pytest.raises(ArgumentError, match="images of 16 pixels have no patches of 32"):
        Patches(resolution=32, tune=tune)(program, training=[(x, x)])
    with pytest.raises(ArgumentError, match="cuts labels like the images of 16 x 16"):
        Patches(resolution=8, tune=tune)(program, training=[(x, x[..., :8])])
    fixed = gw.trace(Enlarged().eval(), (x,), {"x": {0: "batch"}})
    with pytest.raises(ModelError, match="the height and width are fixed"):
        Patches(resolution=8, tune=tune)(fixed, training=[(x, x)])
    with pytest.raises(ArgumentError, match="beta_end"):
        Patches(beta_end=0.0)
