"""Turned patches and mixed noise: the transforms, the loss, and what training makes of a net."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.tune._images.patches import patches, turned
from graphwright.passes.tune.negatives import Negatives, difference, flat_windows, mixed

CHAIN = ("restorer", [("tune.negatives", {
    "patch": 6, "window": 4, "variance": 9.0, "tune": {"epochs": 1, "lr": 0.001, "loss": "mse"},
})])  # fmt: skip

FREE = {"x": {0: "batch", 2: "height", 3: "width"}}


def test_patches_turn_in_their_place() -> None:
    """Against numpy, patch by patch."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 8, 12)
    quarters = torch.randint(0, 8, (2, 2, 3))
    found = turned(image, quarters, 4)
    for b, c, i, j in product(range(2), range(3), range(2), range(3)):
        rows, columns = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        wanted = np.rot90(image[b, c, rows, columns].numpy(), int(quarters[b, i, j]))
        assert np.array_equal(found[b, c, rows, columns].numpy(), wanted)
    assert torch.equal(turned(image, torch.full((2, 2, 3), 4), 4), image)
    assert torch.equal(turned(found, 4 - quarters % 4, 4), image)
    assert torch.equal(patches(image, 4)[1, 2, 1, 2], image[1, 2, 4:, 8:])


def test_a_net_without_directions_agrees_and_another_does_not() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 1, 24, 24, dtype=torch.float64)
    quarters = torch.randint(0, 4, (2, 2, 2))
    other = turned(image, quarters, 12)
    pixelwise, conv = nn.Conv2d(1, 1, 1).double(), nn.Conv2d(1, 1, 3, padding=1).double()
    round_kernel = torch.tensor([[1.0, 2, 1], [2, 5, 2], [1, 2, 1]]).double()
    with torch.no_grad():
        assert difference(pixelwise(image), pixelwise(other), quarters, 12, 0) < 1e-14
        assert difference(conv(image), conv(other), quarters, 12, 1) > 0.05
        conv.weight.copy_(round_kernel)
        assert difference(conv(image), conv(other), quarters, 12, 1) < 1e-14
        assert difference(conv(image), conv(other), quarters, 12, 0) > 0.01, "edges see neighbours"
        # an output of twice the size has patches of twice the size
        double = nn.Upsample(scale_factor=2)
        large = difference(double(pixelwise(image)), double(pixelwise(other)), quarters, 24, 2)
        assert large < 1e-14


def test_noise_is_what_flat_windows_show() -> None:
    torch.manual_seed(0)
    flat = 0.5 + 0.01 * torch.randn(1, 1, 8, 8)
    busy, black = torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    row = torch.cat([busy, flat, black, torch.rand(1, 1, 8, 3)], 3)
    found = flat_windows([row, torch.cat([flat, busy], 2)], 8, 1e-3)
    assert torch.equal(found, torch.cat([flat, flat]))
    assert len(flat_windows([busy], 8, 1e-3)) == 0
    image = torch.rand(1, 1, 12, 20)
    whole = torch.cat([torch.cat([flat] * 3, 3)] * 2, 2)[:, :, :12, :20]
    torch.testing.assert_close(mixed(image, flat, 0.25), 0.75 * image + 0.25 * whole)


class Sharpener(nn.Module):
    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(1, factor**2, 3, padding=1), factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(x), self.factor)


def sharpener(factor: int = 1) -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Sharpener(factor).eval(), (torch.randn(2, 1, 12, 14),), FREE)


def directed(kernel: Tensor) -> float:
    """How far kernels are from their turns."""
    turns = torch.stack([kernel.rot90(k, (-2, -1)) for k in range(4)])
    return float((kernel - turns.mean(0)).norm() / kernel.norm())


def test_training_takes_directions_out_of_kernels() -> None:
    torch.manual_seed(1)
    x = torch.rand(16, 1, 16, 16)
    data = [(part, part) for part in x.split(4)]
    tune = {"steps": 150, "lr": 0.02, "optimizer": "adam", "loss": "mse"}
    found = {}
    for agreement in (0.0, 10.0):
        step = Negatives(patch=8, margin=1, mix=0.0, agreement=agreement, tune=tune)
        found[agreement] = step(sharpener(), training=data, check=False).state["conv.weight"]
    before = directed(sharpener().state["conv.weight"].detach())
    assert directed(found[10.0].detach()) < 0.05 * before


def test_enlarging_nets_and_mixed_noise() -> None:
    torch.manual_seed(1)
    x = torch.rand(8, 1, 16, 16)
    x[:, :, :8, :8] = 0.5 + 0.01 * torch.randn(8, 1, 8, 8)
    labels = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    step = Negatives(patch=8, window=8, tune={"steps": 40, "lr": 0.02, "loss": "mse"})
    result = step.execute(sharpener(2), Context(training=[(x, labels)]))
    assert result.metrics["noise_windows"] == 8
    assert result.metrics["last_loss"] < result.metrics["first_loss"]


SPEC = """
version: 1
training: {data: train.npz, batch_size: 4}
passes:
  - tune.negatives: {patch: 8, mix: 0, tune: {steps: 5, lr: 0.001, loss: mse}}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    sharpener().save(tmp_path / "net.pt2")
    x = torch.rand(8, 1, 16, 16).numpy()
    np.savez(tmp_path / "train.npz", x=x, labels=x)
    (tmp_path / "spec.yaml").write_text(SPEC)
    gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.onnx"))


def test_what_cannot_be_right_is_refused() -> None:
    x = torch.rand(4, 1, 16, 16)
    tune = {"steps": 1, "loss": "mse"}
    with pytest.raises(
        ArgumentError, match="images of 16 x 16 are no two or more whole cells of 6"
    ):
        Negatives(patch=6, tune=tune)(sharpener(), training=[(x, x)])
    with pytest.raises(ArgumentError, match="no window of 8 pixels in the training images"):
        Negatives(patch=8, window=8, tune=tune)(sharpener(), training=[(x, x)])
    flat = gw.trace(nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(),
                    (x,), {"input": {0: "batch"}})  # fmt: skip
    with pytest.raises(ModelError, match="trains restorers, and the output is"):
        Negatives(tune=tune)(flat, training=[(x, x)])
    half = gw.trace(nn.Conv2d(1, 1, 3, 2, 1).eval(), (x,), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match=r"it makes \[8, 8\] pixels of \[16, 16\]"):
        Negatives(patch=8, mix=0.0, tune=tune)(half, training=[(x, x[:, :, ::2, ::2])])
    with pytest.raises(ArgumentError, match="margin 4 leaves nothing of a patch of 8"):
        Negatives(patch=8, margin=4)
    with pytest.raises(ArgumentError, match="window has no part where mix is 0"):
        Negatives(mix=0.0, window=8)
