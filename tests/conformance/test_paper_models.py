"""The papers' model families: their own promises, and the compiler's on them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conformance.zoo import randomize_
from models.activation_free import ActivationFreeNet, Block
from models.series import TinyTimeMixer
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.graph.nodes import op_name


def mixer(**settings: int) -> TinyTimeMixer:
    torch.manual_seed(0)
    model = TinyTimeMixer(**settings).eval()
    randomize_(model)
    return model


def series(batch: int = 3, length: int = 30, channels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    past = torch.randn(batch, length, channels, generator=g)
    return past, torch.ones_like(past), torch.tensor([0, 2, 4])[:batch]


def test_silent_mixers_are_the_identity() -> None:
    levels = mixer(levels=3, width=32).levels
    with torch.no_grad():
        for name, p in levels.named_parameters():
            if ".mlp." in name:
                p.zero_()
    x = torch.randn(2, 3, 4, 32)
    assert torch.equal(levels(x), x)


def test_a_forecast_follows_the_scale_of_the_series() -> None:
    model = mixer()
    past, seen, token = series()
    found, moved = model(past, seen, token), model(100 * past + 7, seen, token)
    torch.testing.assert_close(moved, 100 * found + 7, rtol=1e-3, atol=1e-2)


def test_values_that_were_not_seen_do_not_set_the_scale() -> None:
    model = mixer(context=32)
    past, seen, token = series(length=32)
    seen[:, 5] = 0
    with torch.no_grad():
        model.head.weight.zero_()
    past[:, 5] = 1000
    rest = torch.cat([past[:, :5], past[:, 6:]], 1)
    mean, spread = rest.mean(1), rest.var(1, unbiased=False)
    wanted = mean[:, None] + model.head.bias[:, None] * torch.sqrt(spread + 1e-5)[:, None]
    torch.testing.assert_close(model(past, seen, token), wanted, rtol=1e-5, atol=1e-5)


class Fixed(nn.Module):
    """A mixer for one resolution."""

    def __init__(self, model: TinyTimeMixer, resolution: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("resolution", torch.tensor([resolution]))

    def forward(self, past: Tensor, observed: Tensor) -> Tensor:
        return self.model(past, observed, self.resolution.expand(past.shape[0]))


def test_the_token_of_a_fixed_resolution_is_folded() -> None:
    model = mixer()
    past, seen, _ = series()
    program = gw.trace(Fixed(model, 2).eval(), (past, seen))
    folded = gw.passes.cleanup.FoldConstants()(program)
    assert "embedding" in {op_name(n) for n in program.graph.nodes}
    assert "embedding" not in {op_name(n) for n in folded.graph.nodes}
    wanted = model(past, seen, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(folded(past, seen), wanted, rtol=1e-5, atol=1e-5)


def test_patches_are_a_convolution_with_a_stride() -> None:
    model = mixer(context=32)
    x = torch.randn(2, 3, 32)
    patches = model.embed(x.unfold(-1, 8, 8))
    weight = model.embed.weight.unsqueeze(1)
    wanted = F.conv1d(x.reshape(6, 1, 32), weight, model.embed.bias, stride=8)
    torch.testing.assert_close(patches.reshape(6, 4, 16), wanted.mT, rtol=1e-5, atol=1e-6)


def test_tuned_on_waves_it_beats_the_last_value() -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(2)
    start = 2 * math.pi * torch.rand(256, 1, 2, generator=g)
    wave = torch.sin(start + 0.4 * torch.arange(38)[None, :, None])
    past, future = wave[:, :32], wave[:, 32:]
    model = TinyTimeMixer(context=32, horizon=6).eval()
    token = torch.zeros(256, dtype=torch.int64)
    data = [
        {"past": past[i : i + 32], "observed": torch.ones(32, 32, 2),
         "resolution": token[i : i + 32], "labels": future[i : i + 32]}
        for i in range(0, 256, 32)
    ]  # fmt: skip
    example = (past[:4], torch.ones(4, 32, 2), token[:4])
    program = gw.trace(model, example, "batch")
    tune = {"epochs": 8, "lr": 0.01, "loss": "mse"}
    tuned = gw.passes.tune.Finetune(tune=tune)(program, training=data)
    with torch.no_grad():
        found = tuned(past, torch.ones_like(past), token)
    error = (found - future).square().mean()
    persistence = (past[:, -1:] - future).square().mean()
    assert error < 0.2 * persistence


@pytest.mark.parametrize("mixed", [None, 2])
def test_a_mixer_in_eight_bits_on_both_backends(mixed: int | None) -> None:
    past, seen, token = given = series()
    program = gw.trace(mixer(mixed=mixed), given, "batch")  # type: ignore[arg-type]
    batch = {"past": past, "observed": seen, "resolution": token}
    small = gw.passes.quantize.Int8(activations="static")(program, calibration=[batch])
    exact = program(*given)
    assert (small(*given) - exact).norm() < 0.1 * exact.norm()
    for backend in ("onnxruntime", "triton"):
        found = gw.lower(small, backend)(*given).detach()
        assert (found - small(*given)).norm() < 2e-2 * exact.norm()


# ---- the activation-free net


def denoiser() -> ActivationFreeNet:
    torch.manual_seed(0)
    model = ActivationFreeNet().eval()
    randomize_(model)
    return model


def images(height: int = 12, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    noisy, guess = torch.randn(2, 2, 3, height, width, generator=g)
    return noisy, guess, torch.tensor([3, 80])


def test_a_block_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(Block(4, 16)(x, torch.randn(2, 16)), x)


def test_no_activation_is_left_in_the_graph() -> None:
    program = gw.trace(denoiser(), images(), "batch")
    found = {op_name(node) for node in program.graph.nodes}
    assert not found & {"relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "leaky_relu"}
    assert "mul" in found


def test_a_block_has_the_parameters_of_its_formula() -> None:
    c, time = 6, 24
    pointwise = (2 * c * c + 2 * c) * 2 + 3 * (c * c + c)  # wide, up; attention, project, down
    depth = 2 * c * 9 + 2 * c
    moves = 4 * c * (time // 2) + 4 * c
    assert sum(p.numel() for p in Block(c, time).parameters()) == (
        pointwise + depth + moves + 4 * c  # two gains, two scales
    )


def test_odd_sizes_are_padded_and_cut() -> None:
    model = denoiser()
    noisy, guess, step = images(9, 14)
    wanted = model(F.pad(noisy, (0, 2, 0, 3)), F.pad(guess, (0, 2, 0, 3)), step)
    found = model(noisy, guess, step)
    assert found.shape == noisy.shape
    torch.testing.assert_close(found, wanted[:, :, :9, :14])


def test_an_activation_free_net_in_eight_bits_on_both_backends() -> None:
    noisy, guess, step = given = images()
    program = gw.trace(denoiser(), given, "batch")
    batch = {"noisy": noisy, "guess": guess, "step": step}
    small = gw.passes.quantize.Int8(activations="static")(program, calibration=[batch])
    exact = program(*given)
    assert (small(*given) - exact).norm() < 0.2 * exact.norm()
    for backend in ("onnxruntime", "triton"):
        found = gw.lower(small, backend)(*given).detach()
        assert (found - small(*given)).norm() < 3e-2 * exact.norm()
