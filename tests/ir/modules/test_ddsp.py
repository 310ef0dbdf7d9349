"""DDSP modules equal the same signal processing in numpy and scipy, in both artifacts too."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.modules.ddsp import FilteredNoise, FirReverb, Harmonic, exp_sigmoid

RATE, HOP = 16000, 64


def scaled(x: np.ndarray) -> np.ndarray:
    return 2 * (1 / (1 + np.exp(-x))) ** np.log(10) + 1e-7


def controls(frames: int, bands: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    frequency = 200 + 400 * torch.rand(2, frames, 1, generator=g)
    return (
        frequency,
        torch.randn(2, frames, 1, generator=g),
        torch.randn(2, frames, bands, generator=g),
    )


def oscillator(frequency: np.ndarray, amplitude: np.ndarray, share: np.ndarray) -> np.ndarray:
    """One sample after the other, in double precision."""
    frames, count = share.shape
    multiples = np.arange(1, count + 1)
    share = scaled(share) * (frequency * multiples < RATE / 2)
    level = scaled(amplitude) * share / np.maximum(share.sum(-1, keepdims=True), 1e-7)
    found, phase = np.zeros(frames * HOP), 0.0
    for i in range(frames * HOP):
        k, t = divmod(i, HOP)
        after = min(k + 1, frames - 1)
        now = frequency[k, 0] + (frequency[after, 0] - frequency[k, 0]) * t / HOP
        phase += 2 * np.pi * now / RATE
        w = np.sin(np.pi / 2 * t / HOP) ** 2
        here = level[k] * (1 - w) + level[after] * w
        here = here * (now * multiples < RATE / 2)
        found[i] = (here * np.sin(multiples * phase)).sum()
    return found


def test_the_oscillator_is_a_sum_of_sines() -> None:
    given = controls(9, 7)
    found = Harmonic(7)(*given)
    for row in range(2):
        wanted = oscillator(*(c[row].double().numpy() for c in given))
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=2e-5)


def test_one_harmonic_is_the_sine_of_its_frequency() -> None:
    frames = 250
    frequency = torch.full((1, frames, 1), 440.0)
    silent = torch.zeros(1, frames, 1)
    found = Harmonic(1)(frequency, silent, silent)[0].double().numpy()
    level = float(exp_sigmoid(torch.zeros(())))
    wanted = level * np.sin(2 * np.pi * 440 * (np.arange(frames * HOP) + 1) / RATE)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    rising = int(((found[:-1] < 0) & (found[1:] >= 0)).sum())
    assert abs(rising - 440 * frames * HOP / RATE) <= 1


def test_the_phase_is_right_after_ten_seconds() -> None:
    frames = 10 * RATE // HOP
    g = torch.Generator().manual_seed(1)
    frequency = 300 + 50 * torch.rand(1, frames, 1, generator=g)
    found = Harmonic(1).phase(frequency)[0].double().numpy()
    f = frequency[0, :, 0].double().numpy()
    at = np.arange(frames * HOP) / HOP
    exact = np.cumsum(np.interp(at, np.arange(frames), f) / RATE)
    away = np.abs(found - exact % 1)
    assert 2 * np.pi * np.minimum(away, 1 - away).max() < 1e-4


def test_harmonics_above_half_the_sample_rate_are_silent() -> None:
    frequency = torch.full((1, 20, 1), 3000.0)
    share = torch.tensor([-20.0, -20.0, 5.0]).expand(1, 20, 3)  # the third is at 9000 Hz
    found = Harmonic(3)(frequency, torch.ones(1, 20, 1), share)[0]
    spectrum = np.abs(np.fft.rfft(found.numpy() * np.hanning(20 * HOP)))
    hertz = np.fft.rfftfreq(20 * HOP, 1 / RATE)
    assert spectrum[np.abs(hertz - 7000) < 100].max() < 1e-3 * spectrum.max()  # its alias


def noise_by_hand(magnitudes: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The published path through Fourier space, frame by frame."""
    frames, bands = magnitudes.shape
    size = 2 * (bands - 1)
    window = np.fft.fftshift(scipy.signal.get_window("hann", size))
    total = np.zeros(frames * HOP + 4 * size)
    for k in range(frames):
        response = np.fft.fftshift(np.fft.irfft(scaled(magnitudes[k] - 5), size) * window)
        part = scipy.signal.convolve(noise[k * HOP : (k + 1) * HOP], response)
        total[k * HOP : k * HOP + len(part)] += part
    start = (size - 1) // 2 - 1
    return total[start : start + frames * HOP]


@pytest.mark.parametrize("bands", [65, 33])
def test_filtered_noise_is_the_path_through_fourier_space(bands: int) -> None:
    g = torch.Generator().manual_seed(0)
    magnitudes = 3 + 2 * torch.randn(2, 6, bands, generator=g)
    noise = 2 * torch.rand(2, 6 * HOP, generator=g) - 1
    found = FilteredNoise(bands)(magnitudes, noise)
    for row in range(2):
        wanted = noise_by_hand(magnitudes[row].double().numpy(), noise[row].double().numpy())
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_flat_filter_delays_the_noise_by_two_samples() -> None:
    noise = 2 * torch.rand(1, 8 * HOP) - 1
    found = FilteredNoise()(torch.full((1, 8, 65), 6.0), noise)
    gain = float(exp_sigmoid(torch.tensor(1.0)))
    torch.testing.assert_close(found[:, 2:], gain * noise[:, :-2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", [40, 700])
@pytest.mark.parametrize("length", [30, 1024, 3001])
def test_reverb_is_a_causal_convolution(taps: int, length: int) -> None:
    g = torch.Generator().manual_seed(0)
    reverb, audio = FirReverb(taps), torch.randn(2, length, generator=g)
    assert torch.equal(reverb(audio), audio)
    with torch.no_grad():
        reverb.response.normal_(generator=g)
    response = np.concatenate([[0], reverb.response.detach().double().numpy()])
    for row in range(2):
        wet = scipy.signal.fftconvolve(audio[row].double().numpy(), response)[:length]
        wanted = audio[row].double().numpy() + wet
        found = reverb(audio)[row].detach().numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_one_tap_is_one_echo() -> None:
    reverb, audio = FirReverb(900), torch.randn(1, 2000)
    with torch.no_grad():
        reverb.response[699] = 0.5
    wanted = audio.clone()
    wanted[:, 700:] += 0.5 * audio[:, :-700]
    torch.testing.assert_close(reverb(audio).detach(), wanted, rtol=1e-5, atol=1e-5)


class Synthesizer(nn.Module):
    """A small decoder, its oscillator and noise, and a room."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 12, batch_first=True)
        self.amplitude, self.share, self.bands = (nn.Linear(12, n) for n in (1, 5, 17))
        self.oscillator, self.noise = Harmonic(5), FilteredNoise(17)
        self.room = FirReverb(taps)

    def forward(self, frequency: Tensor, loudness: Tensor, noise: Tensor) -> Tensor:
        h, _ = self.rnn(torch.cat([frequency / 500, loudness], -1))
        tone = self.oscillator(frequency, self.amplitude(h), self.share(h))
        return self.room(tone + self.noise(self.bands(h), noise))


@pytest.mark.parametrize("taps", [32, 600])
def test_a_synthesizer_exports_whole(taps: int) -> None:
    torch.manual_seed(0)
    model = Synthesizer(taps).eval()
    with torch.no_grad():
        model.room.response.normal_(0, 0.05)
    frequency, loudness, _ = controls(20, 1)
    noise = 2 * torch.rand(2, 20 * HOP) - 1
    program = gw.trace(model, (frequency, loudness, noise), "batch")
    small = gw.passes.quantize.Rtn(bits=8, targets=["amplitude", "share", "bands"], block=16)(
        program
    )
    for made, bound in ((program, 1e-5), (small, 1e-2)):  # its products round what they read
        wanted = made(frequency, loudness, noise).detach()
        for backend in ("onnxruntime", "triton"):
            found = gw.lower(made, backend)(frequency, loudness, noise).detach()
            assert (found - wanted).norm() < bound * wanted.norm()


def test_gradients_are_finite_at_silence() -> None:
    frequency = torch.zeros(1, 4, 1, requires_grad=True)
    quiet = torch.full((1, 4, 3), -90.0, requires_grad=True)
    Harmonic(3)(frequency, quiet[..., :1], quiet).square().sum().backward()
    assert frequency.grad.isfinite().all()
    assert quiet.grad.isfinite().all()
