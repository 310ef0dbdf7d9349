"""The synthesizer of P62 and the codec of P76: their own promises, and the compiler's on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance.zoo import randomize_
from models.audio_and_codec import (
    RegionCodec,
    RegionTransform,
    Synthesizer,
    region_means,
    spread,
)
from torch import Tensor

import graphwright as gw

FRAMES = 20


def synthesizer() -> Synthesizer:
    torch.manual_seed(0)
    model = Synthesizer().eval().requires_grad_(False)
    model.room.response.normal_(std=0.1)
    return model


def played(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    frequency = 200 + 600 * torch.rand(batch, FRAMES, 1, generator=g)
    loudness = torch.rand(batch, FRAMES, 1, generator=g)
    return frequency, loudness, 2 * torch.rand(batch, 16 * FRAMES, generator=g) - 1


def test_a_synthesizer_is_silent_but_for_its_floor_when_it_is_told_so() -> None:
    model = synthesizer()
    model.controls.weight.zero_()
    model.controls.bias.fill_(-100.0)
    assert model(*played()).abs().max() < 1e-4
    model.controls.bias[0] = 3.0
    assert model(*played()).abs().max() > 0.1


def test_a_synthesizer_in_both_artifacts() -> None:
    model, given = synthesizer(), played()
    program = gw.trace(model, given, "batch")
    wanted = model(*given)
    torch.testing.assert_close(program(*given), wanted, rtol=1e-4, atol=1e-5)
    for backend in ("onnxruntime", "triton"):
        artifact = gw.lower(program, backend)
        for batch in (2, 3):
            right = model(*played(batch))
            assert (artifact(*played(batch)) - right).abs().max() <= 2e-4 * right.abs().max()


def test_means_of_regions_come_back_and_a_grid_is_a_map() -> None:
    g = torch.Generator().manual_seed(0)
    regions = torch.arange(16).reshape(4, 4)
    regions = regions.repeat_interleave(2, 0).repeat_interleave(3, 1).expand(2, 8, 12)
    values = torch.randn(2, 16, 5, generator=g, dtype=torch.float64)
    flat = spread(values, regions)
    found = region_means(flat, regions, 16)
    torch.testing.assert_close(found * (6 + 5e-4) / 6, values)
    x = torch.randn(2, 5, 8, 12, generator=g, dtype=torch.float64)
    cells = F.adaptive_avg_pool2d(x, 4)
    by_map = region_means(x, regions, 16) * (6 + 5e-4) / 6
    torch.testing.assert_close(by_map.mT.reshape(2, 5, 4, 4), cells)
    grid = F.interpolate(cells, size=(8, 12), mode="nearest")
    torch.testing.assert_close(spread(by_map, regions), grid)


def test_kernels_of_one_pixel_change_nothing() -> None:
    net = RegionTransform(5)
    x = torch.randn(2, 6, 7, 8)
    centre = torch.zeros(2, 6, 9, 7, 8)
    centre[:, :, 4] = 1
    assert torch.equal(net.filtered(x, centre.flatten(1, 2)), x)
    left = torch.zeros(2, 6, 9, 7, 8)
    left[:, :, 3] = 1
    assert torch.equal(net.filtered(x, left.flatten(1, 2))[..., 1:], x[..., :-1])


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_a_codec_in_an_artifact(backend: str) -> None:
    torch.manual_seed(0)
    model = RegionCodec().eval().requires_grad_(False)
    randomize_(model)
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    program = gw.trace(model, (x,), "batch")
    image, codes = model(x)
    assert codes.unique().numel() > 5
    found, kept = gw.lower(program, backend)(x)
    # a number on the edge between two may fall to either, and moves pixels around it alone
    assert ((kept - codes).abs() > 1e-3).double().mean() < 1e-3
    off = (found - image).abs() > 1e-4 * image.abs().max()
    assert off.double().mean() < 0.02
