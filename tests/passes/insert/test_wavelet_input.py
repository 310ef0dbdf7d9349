"""Wavelet inputs: the bands by hand, the network at the start, encoders of two and three axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.modules.haar import HaarInput

CHAIN = ("stages", [("insert.wavelet_input", {"channels": 2})])


class UNet(nn.Module):
    """Four stages of an encoder and a short decoder."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
        last = (1, 2, 2) if axes == 3 else 2
        self.stages = nn.ModuleList([
            conv(1, 4, 3, padding=1), conv(4, 5, 3, stride=2, padding=1),
            conv(5, 6, 3, stride=2, padding=1), conv(6, 7, 3, stride=last, padding=1),
        ])  # fmt: skip
        self.head = conv(7, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        for stage in self.stages:
            image = F.leaky_relu(stage(image))
        return self.head(image)


def unet(axes: int = 2) -> gw.Program:
    torch.manual_seed(0)
    shape = (2, 1, 8, 16, 16)[-axes - 2 :] if axes == 3 else (2, 1, 16, 24)
    free = {0: "batch"} if axes == 3 else {0: "batch", 2: "height", 3: "width"}
    return gw.trace(UNet(axes).eval(), (torch.randn(shape),), {"image": free})


def moved(program: gw.Program) -> gw.Program:
    """As training would leave it."""
    g = torch.Generator().manual_seed(3)
    return program.replace(state={
        name: nn.Parameter(t + 0.3 * torch.randn(t.shape, generator=g))
        if isinstance(t, nn.Parameter) else t
        for name, t in program.state.items()
    })  # fmt: skip


def test_low_pass_images_are_the_formula() -> None:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    found = HaarInput(3, (1, 1), 4).low_pass(x)
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    torch.testing.assert_close(found, (a + b + c + d) / 2, rtol=1e-6, atol=1e-7)
    twice = HaarInput(3, (2, 2), 4).low_pass(x)
    wanted = F.avg_pool2d(x, 4) * 4  # the mean times 2, twice
    torch.testing.assert_close(twice, wanted, rtol=1e-6, atol=1e-6)
    y = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64)
    cube = HaarInput(2, (1, 1, 1), 4).low_pass(y)
    torch.testing.assert_close(cube, F.avg_pool3d(y, 2) * 2 * 2**0.5, rtol=1e-6, atol=1e-6)
    flat = HaarInput(2, (0, 1, 1), 4).low_pass(y)
    torch.testing.assert_close(flat, F.avg_pool3d(y, (1, 2, 2)) * 2, rtol=1e-6, atol=1e-6)


def test_all_bands_keep_the_image() -> None:
    """The transform is orthogonal: the energy stays, and every band is a sum or a difference."""
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    bands = HaarInput(1, (1, 1), 4, all_bands=True).low_pass(x)
    assert bands.shape == (1, 4, 3, 3)
    np.testing.assert_allclose(float(bands.square().sum()), float(x.square().sum()), rtol=1e-6)
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    wanted = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2
    torch.testing.assert_close(bands, wanted, rtol=1e-6, atol=1e-6)


def test_odd_lengths_repeat_their_end() -> None:
    x = torch.arange(1.0, 6.0).view(1, 1, 5)
    found = HaarInput(1, (1,), 2).low_pass(x).flatten()
    torch.testing.assert_close(found, torch.tensor([3.0, 7.0, 10.0]) / 2**0.5)
    down = HaarInput(1, (1,), 2, round_up=False).low_pass(x).flatten()
    torch.testing.assert_close(down, torch.tensor([3.0, 7.0]) / 2**0.5)


def test_it_starts_as_the_network_at_every_size() -> None:
    before = unet()
    made = gw.passes.insert.WaveletInput(targets=["stages.*"])(before)
    for shape in ((1, 1, 17, 23), (3, 1, 16, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(made(x), before(x), rtol=1e-5, atol=1e-6)
    assert made.state["stages.2.weight"].shape == (6, 10, 3, 3)
    assert made.state["stages.1.weight"].shape == (5, 4, 3, 3)  # it reads the full size


def test_what_is_inserted_is_read() -> None:
    changed = moved(gw.passes.insert.WaveletInput(targets=["stages.2"])(unet()))
    s = {name: t.detach() for name, t in changed.state.items()}
    x = torch.randn(2, 1, 16, 24)
    y = F.leaky_relu(F.conv2d(x, s["stages.0.weight"], s["stages.0.bias"], padding=1))
    y = F.leaky_relu(F.conv2d(y, s["stages.1.weight"], s["stages.1.bias"], 2, 1))
    name = "stages.2.wavelet.lift"
    low = F.conv2d(F.avg_pool2d(x, 2) * 2, s[f"{name}.0.weight"], s[f"{name}.0.bias"], padding=1)
    low = F.instance_norm(low, weight=s[f"{name}.1.weight"], bias=s[f"{name}.1.bias"])
    y = torch.cat([y, F.leaky_relu(low, 0.01)], 1)
    y = F.leaky_relu(F.conv2d(y, s["stages.2.weight"], s["stages.2.bias"], 2, 1))
    y = F.leaky_relu(F.conv2d(y, s["stages.3.weight"], s["stages.3.bias"], 2, 1))
    wanted = F.conv2d(y, s["head.weight"], s["head.bias"])
    torch.testing.assert_close(changed(x).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_volumes_with_unequal_axes() -> None:
    before = unet(3)
    made = gw.passes.insert.WaveletInput(targets=["stages.*"], bands="all", channels=3)(before)
    x = torch.randn(1, 1, 8, 16, 16)
    torch.testing.assert_close(made(x), before(x), rtol=1e-5, atol=1e-6)
    assert made.state["stages.3.wavelet.lift.0.weight"].shape == (3, 8, 3, 3, 3)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_artifacts_are_the_program_behind_pruning_and_int8(backend: str) -> None:
    made = moved(gw.passes.insert.WaveletInput(targets=["stages.*"])(unet()))
    x = torch.randn(2, 1, 16, 24)
    small = gw.passes.prune.Magnitude(sparsity=0.3)(made)
    small = gw.passes.quantize.Int8(activations="static")(small, calibration=[{"image": x}])
    for program, bound in ((made, 1e-5), (small, 3e-2)):  # rounding may move a code of 8 bits
        found, wanted = gw.lower(program, backend)(x).detach(), program(x).detach()
        assert (found - wanted).norm() < bound * wanted.norm()


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(ModelError, match="ends a stage") as failed:
        gw.passes.insert.WaveletInput(targets=["stages.0", "stages.1"])(unet())
    assert "own size" in str(failed.value)
    with pytest.raises(ModelError, match="0 inputs can be the image"):
        gw.passes.insert.WaveletInput(image="picture")(unet())
