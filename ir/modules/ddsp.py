"""Signal processing of P62 as modules that train and export: oscillator, filtered noise, reverb.

Controls come in frames (B, F, ...), audio is (B, F hop) samples. Both lengths may be free.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECT_TAPS = 512
"""Longest response that is convolved by a convolution; longer ones go through Fourier space."""


def exp_sigmoid(x: Tensor) -> Tensor:
    """2 sigmoid(x)^ln 10 + 1e-7: a positive amplitude of any real control."""
    return 2 * torch.sigmoid(x) ** math.log(10) + 1e-7


def interpolated(frames: Tensor, weights: Tensor) -> Tensor:
    """(B, F, C) frames to (B, F hop, C) samples; behind the last frame its value stays.

    Args:
        frames: values at samples 0, hop, 2 hop, ...
        weights: (hop,) share of the next frame at every sample between two.
    """
    following = torch.cat([frames[:, 1:], frames[:, -1:]], 1)
    between = weights.to(frames.dtype)[:, None]
    samples = frames.unsqueeze(2) + (following - frames).unsqueeze(2) * between
    return samples.flatten(1, 2)


class Harmonic(nn.Module):
    """A sum of sines at the multiples of a fundamental frequency.

    Phases are counted in cycles, in double precision, from frame to frame and in closed form
    within one: no error grows with time. Harmonics from half the sample rate on are silent.

    Args:
        harmonics: number of sines.
        hop: samples in a frame.
        sample_rate: in Hz.
    """

    linear: Tensor
    raised: Tensor
    steps: Tensor
    multiples: Tensor

    def __init__(self, harmonics: int = 60, hop: int = 64, sample_rate: int = 16000) -> None:
        super().__init__()
        self.sample_rate, self.hop = sample_rate, hop
        between = torch.arange(hop, dtype=torch.float64) / hop
        self.register_buffer("linear", between)
        self.register_buffer("raised", torch.sin(math.pi / 2 * between) ** 2)
        self.register_buffer("steps", torch.arange(1, hop + 1, dtype=torch.float64))
        self.register_buffer("multiples", torch.arange(1.0, harmonics + 1))

    def phase(self, frequency: Tensor) -> Tensor:
        """Cycles in [0, 1) of the fundamental (B, F, 1) at every sample, that sample included."""
        cycles = frequency.double() / self.sample_rate
        following = torch.cat([cycles[:, 1:], cycles[:, -1:]], 1)
        change = following - cycles
        # sums of the frequencies, which are linear within a frame: (B, F, hop)
        within = self.steps * cycles + change * self.steps * (self.steps - 1) / (2 * self.hop)
        before = torch.cumsum(within[:, :, -1:], 1) - within[:, :, -1:]
        total = (within + before).flatten(1)
        return (total - torch.floor(total)).to(frequency.dtype)

    def forward(self, frequency: Tensor, amplitude: Tensor, distribution: Tensor) -> Tensor:
        """Audio (B, F hop).

        Args:
            frequency: (B, F, 1) of the fundamental, in Hz.
            amplitude: (B, F, 1) control of the loudness, any real number.
            distribution: (B, F, harmonics) controls of the shares, any real numbers.
        """
        half = self.sample_rate / 2
        multiples = self.multiples.to(frequency.dtype)
        share = exp_sigmoid(distribution) * (frequency * multiples < half)
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-7)
        level = interpolated(exp_sigmoid(amplitude) * share, self.raised)
        reached = interpolated(frequency, self.linear) * multiples
        cycles = self.phase(frequency).unsqueeze(-1) * multiples
        sines = torch.sin(2 * math.pi * (cycles - torch.floor(cycles)))
        return (level * (reached < half) * sines).sum(-1)


class FilteredNoise(nn.Module):
    """Noise through a filter that changes from frame to frame.

    The response of a frame is linear in its magnitudes: zero phase, a Hann window, turned causal.
    So it is one product with a stored matrix. The noise is an input, so that results repeat.

    Args:
        bands: magnitudes from zero frequency to half the sample rate, both included.
        hop: samples in a frame.
        bias: added to the controls, so that noise starts low.
    """

    to_response: Tensor

    def __init__(self, bands: int = 65, hop: int = 64, bias: float = -5.0) -> None:
        super().__init__()
        self.hop, self.bias = hop, bias
        self.length = 2 * (bands - 1)
        responses = torch.fft.irfft(torch.eye(bands, dtype=torch.float64), self.length)
        window = torch.hann_window(self.length, periodic=True, dtype=torch.float64)
        self.register_buffer("to_response", (responses.roll(self.length // 2, -1) * window).float())

    def forward(self, magnitudes: Tensor, noise: Tensor) -> Tensor:
        """Audio (B, F hop), two samples late, as published.

        Args:
            magnitudes: (B, F, bands) controls, any real numbers.
            noise: (B, F hop) samples, uniform in [-1, 1).
        """
        response = exp_sigmoid(magnitudes + self.bias) @ self.to_response.to(magnitudes.dtype)
        frames = noise.unflatten(1, (-1, self.hop))
        heard = _convolved(frames, response)
        pieces = -(-heard.shape[-1] // self.hop)
        heard = F.pad(heard, (0, pieces * self.hop - heard.shape[-1]))
        heard = heard.unflatten(-1, (pieces, self.hop))
        # piece p of a frame sounds p frames later
        parts = [F.pad(heard[:, :, p], (0, 0, p, pieces - 1 - p)) for p in range(pieces)]
        samples = torch.stack(parts).sum(0).flatten(1)
        start = (self.length - 1) // 2 - 1
        return samples[:, start : start + noise.shape[1]]


def _convolved(x: Tensor, response: Tensor) -> Tensor:
    """Convolution of the last axes (..., n) and (..., k): (..., n + k - 1)."""
    n, k = x.shape[-1], response.shape[-1]
    products = F.pad(x.unsqueeze(-1) * response.unsqueeze(-2), (0, n))
    # a row of n + k values read at a stride of n + k - 1 is shifted by one place a row
    sheared: Tensor = products.flatten(-2)[..., : n * (n + k - 1)]
    return sheared.view(*x.shape, n + k - 1).sum(-2)


class FirReverb(nn.Module):
    """Audio (B, N) and its reverberation: x + x * h, where h is learned and starts at zero.

    The first tap is always zero: the dry sound has its own path. Long responses go through Fourier
    space in blocks of a fixed size, so that N may be free.

    Args:
        taps: of h.
    """

    def __init__(self, taps: int = 48000) -> None:
        super().__init__()
        self.response = nn.Parameter(torch.zeros(taps - 1))

    def forward(self, audio: Tensor) -> Tensor:
        response = F.pad(self.response, (1, 0))
        if response.shape[0] <= DIRECT_TAPS:
            late = F.pad(audio.unsqueeze(1), (response.shape[0] - 1, 0))
            return audio + F.conv1d(late, response.flip(0).view(1, 1, -1)).squeeze(1)
        return audio + _by_blocks(audio, response)


def _by_blocks(audio: Tensor, response: Tensor) -> Tensor:
    """The first N samples of the convolution, by overlapping blocks in Fourier space."""
    length = audio.shape[1]
    block = 1 << (response.shape[0] - 1).bit_length()
    count = (length + block - 1) // block
    frames = F.pad(audio, (0, count * block - length)).unflatten(1, (count, block))
    spectrum = torch.fft.rfft(frames, 2 * block) * torch.fft.rfft(response, 2 * block)
    heard = torch.fft.irfft(spectrum, 2 * block)
    ends = F.pad(heard[:, :-1, block:], (0, 0, 1, 0))
    samples: Tensor = (heard[:, :, :block] + ends).flatten(1)
    return samples[:, :length]
