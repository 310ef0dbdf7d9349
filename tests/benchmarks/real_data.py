"""Speech, tones and faces for `real_weights.py`: made here, or read from a package's own files."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import wavfile
from scipy.signal import get_window, resample_poly

Array = np.ndarray[Any, Any]

RATE = 16000
SPEAKERS = (
    "en-us", "en-us+f1", "en-us+f4", "en-us+m5", "en-us+m7", "en-us+Alicia", "en-us+Denis",
    "en-us+whisper", "en-us+klatt2", "en-us+steph", "en-us+grandma", "en-us+Lee",
)  # fmt: skip
"""Voices of espeak-ng, with the variants that change the speaker."""

CALIBRATION_TEXTS = (
    "The evening train was late again, so we walked along the river and counted the boats.",
    "Seven small lamps hung over the table, and every one of them had another colour.",
)
HELD_OUT_TEXTS = (
    "Bread, butter, a little salt and an onion: that is all you need for a good supper.",
    "Nobody had told the gardener that the old wall would be gone before the winter.",
    "If the measurement is wrong, say so at once and repeat it from the beginning.",
)


def package_file(package: str, name: str) -> Path:
    """A file that an installed package ships, found without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"needs the package {package}: see the top of real_weights.py")
    return Path(found.submodule_search_locations[0]) / name


@cache
def speech(speaker: str, text: str) -> Array:
    """One sentence by one voice, at 16 kHz, peak 0.5: (samples,) of float32."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("needs the program espeak-ng, which speaks the test sentences")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = ["espeak-ng", "-v", speaker, "-s", "150", "-w", str(path), text]
        subprocess.run(command, check=True, capture_output=True)
        rate, samples = wavfile.read(path)
    assert rate == 22050
    wave = resample_poly(samples.astype(np.float64), 320, 441)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def mel_spectrogram(wave: Array, channels: int = 40, window: int = 400, step: int = 160) -> Array:
    """Power spectrogram on the mel scale of Slaney's Auditory Toolbox: (frames, channels).

    What the speaker encoder was trained on: 25 ms windows, 10 ms steps, no logarithm.
    """
    padded = np.pad(wave, window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::step]
    power = np.abs(np.fft.rfft(frames * get_window("hann", window), axis=1)) ** 2
    return (power @ _mel_filters(channels, window)).astype(np.float32)


def _mel_filters(channels: int, window: int) -> Array:
    """Triangles of equal area, linear below 1 kHz and logarithmic above: (bins, channels)."""
    step = np.log(6.4) / 27
    top = 15 + np.log(RATE / 2 / 1000) / step
    mels = np.linspace(0, top, channels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    bins = np.fft.rfftfreq(window, 1 / RATE)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles: Array = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return triangles


def utterances(texts: tuple[str, ...]) -> tuple[Array, Array]:
    """Mel spectrograms of 1.6 s, every 0.4 s of what all speakers say, and whose text each is.

    The loudness is that of the encoder's own preprocessing, -30 dBFS. Utterances are numbered
    speaker by speaker.
    """
    parts, owners = [], []
    for speaker in SPEAKERS:
        for text in texts:
            wave = speech(speaker, text)
            mel = mel_spectrogram(wave * (10 ** (-30 / 20) / np.sqrt(np.mean(wave**2))))
            windows = np.lib.stride_tricks.sliding_window_view(mel, 160, axis=0)[::40]
            owners += [owners[-1] + 1 if owners else 0] * len(windows)
            parts.append(windows.transpose(0, 2, 1))
    return np.concatenate(parts), np.array(owners)


def normalized_frames(frames: Array) -> Array:
    """Frames of mean 0 and standard deviation 1, as the pitch tracker takes them."""
    centred = frames - frames.mean(1, keepdims=True)
    normal: Array = centred / np.maximum(1e-10, centred.std(1, ddof=1, keepdims=True))
    return normal.astype(np.float32)


def speech_frames(texts: tuple[str, ...], count: int, seed: int) -> Array:
    """Frames of 1024 samples from all speakers, the louder half only: (count, 1024)."""
    waves = [speech(speaker, text) for speaker in SPEAKERS for text in texts]
    frames = np.concatenate(
        [np.lib.stride_tricks.sliding_window_view(wave, 1024)[::160] for wave in waves]
    )
    loud = frames[frames.std(1) > np.median(frames.std(1))]
    chosen = np.random.default_rng(seed).choice(len(loud), count, replace=False)
    return normalized_frames(loud[chosen])


def tones(count: int, seed: int) -> tuple[Array, Array]:
    """Harmonic tones in a little noise, and their pitch in Hz: (count, 1024) and (count,)."""
    rng = np.random.default_rng(seed)
    pitch = np.exp(rng.uniform(np.log(60), np.log(1000), count))
    time = np.arange(1024) / RATE
    overtone = np.arange(1, 9)[None, :, None]
    phase = 2 * np.pi * (pitch[:, None, None] * overtone * time + rng.random((count, 8, 1)))
    strength = rng.uniform(0.3, 1, (count, 8, 1)) / overtone
    audible = pitch[:, None, None] * overtone < RATE / 2
    wave = (strength * audible * np.sin(phase)).sum(1)
    return normalized_frames(wave + 0.02 * rng.standard_normal(wave.shape)), pitch


def voice_between_noise(seed: int) -> tuple[Array, Array]:
    """Sentences with pauses, all in noise, and where there is speech: (samples,) twice."""
    rng = np.random.default_rng(seed)
    parts, truth = [], []
    for index, text in enumerate(HELD_OUT_TEXTS * 2):
        pause = np.zeros(int(RATE * rng.uniform(0.8, 1.6)), np.float32)
        said = speech(SPEAKERS[index], text)
        parts += [pause, said]
        truth += [np.zeros(len(pause), bool), np.ones(len(said), bool)]
    wave = np.concatenate(parts)
    noise = 0.003 * rng.standard_normal(len(wave))
    return (wave + noise).astype(np.float32), np.concatenate(truth)


def faces(size: int) -> tuple[Array, Array]:
    """100 faces and 100 other cuttings of photographs, and which are faces: (200, 3, size, size).

    The cuttings are 25 x 25 and grey (from scikit-image, from "Labeled Faces in the Wild").
    """
    import torch

    images = np.load(package_file("skimage", "data/lfw_subset.npy"))
    grey = torch.from_numpy(images)[:, None].float()
    resized = torch.nn.functional.interpolate(grey, (size, size), mode="bilinear", antialias=True)
    # The detector was trained on values (v - 127.5) / 128.
    inputs = ((resized * 255 - 127.5) / 128).expand(-1, 3, -1, -1).contiguous().numpy()
    return inputs, np.arange(200) < 100
