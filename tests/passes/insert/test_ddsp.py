"""The inserted room: silent at the start, a causal convolution when trained, at any length."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = ("conv", [("insert.ddsp", {"taps": 4})])


class Enhancer(nn.Module):
    """Audio in, audio out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(1, 6, 9, padding=4), nn.Tanh(), nn.Conv1d(6, 1, 1))

    def forward(self, audio: Tensor) -> Tensor:
        return self.conv(audio.unsqueeze(1)).squeeze(1)


def enhancer() -> gw.Program:
    torch.manual_seed(0)
    free = {"audio": {0: "batch", 1: "samples"}}
    return gw.trace(Enhancer().eval(), (torch.randn(2, 1500),), free)


@pytest.mark.parametrize("taps", [200, 900])
def test_it_starts_silent_and_becomes_a_room(taps: int) -> None:
    before = enhancer()
    made = gw.passes.insert.Ddsp(taps=taps)(before)
    audio = torch.randn(1, 2100)
    torch.testing.assert_close(made(audio), before(audio))
    g = torch.Generator().manual_seed(1)
    response = 0.2 * torch.randn(taps - 1, generator=g)
    state = {**made.state, "reverb.response": nn.Parameter(response)}
    trained = made.replace(state=state)
    dry = before(audio)[0].detach().double().numpy()
    wet = scipy.signal.fftconvolve(dry, np.concatenate([[0], response.double().numpy()]))
    wanted = dry + wet[: len(dry)]
    for run in (trained, gw.lower(trained, "onnxruntime"), gw.lower(trained, "triton")):
        found = run(audio)[0].detach().numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_it_composes_with_int8_and_pruning() -> None:
    made = gw.passes.insert.Ddsp(taps=50, freeze=True)(enhancer())
    assert list(made.trainable()) == ["reverb.response"]
    audio = torch.randn(2, 400)
    small = gw.passes.prune.Magnitude(sparsity=0.3)(made)
    small = gw.passes.quantize.Int8(activations="static", targets=["conv.*"])(
        small, calibration=[{"audio": audio}]
    )
    wanted = small(audio).detach()
    for backend in ("onnxruntime", "triton"):
        found = gw.lower(small, backend)(audio).detach()
        assert (found - wanted).norm() < 2e-2 * wanted.norm()


def test_a_network_without_audio_is_refused() -> None:
    image = gw.trace(nn.Conv2d(1, 1, 3).eval(), (torch.randn(1, 1, 5, 5),))
    with pytest.raises(ModelError, match="0 outputs are audio"):
        gw.passes.insert.Ddsp()(image)
