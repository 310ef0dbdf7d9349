"""4-bit weights on ONNX Runtime's CPU kernels: products of a decoder, and the sentence encoder.

    python tests/benchmarks/int4_cpu.py [--seconds 4] [--out out/bench-int4] [--only 8x128,...]
        [--part products|encoder]

Two threads (`OMP_NUM_THREADS`), all candidates in turn, call by call; the tables show medians and
ratios to float32. Peers: onnxruntime's own `MatMulNBitsQuantizer` with its defaults (symmetric
off) on the same float32 model. Fidelity is over the 320 held-out sentences of tests/models.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parents[2]

import numpy as np
import onnx
import onnxruntime
import torch
from benchmarks.cpu_sessions import caller, session, silent
from models import encoder

import graphwright as gw
from graphwright.job.latency import Timing, alternate

THREADS = int(os.environ["OMP_NUM_THREADS"])
SHAPES = [(batch, length) for batch in (1, 8) for length in (16, 64, 128, 256)]
MATRICES = [(4096, 4096), (4096, 11008)]
FORMS: dict[str, dict[str, Any]] = {
    "4 bits, block 32": {"bits": 4, "block": 32},
    "4 bits, block 32, symmetric": {"bits": 4, "block": 32, "symmetric": True},
    "4 bits, block 128": {"bits": 4, "block": 128},
    "3 bits, block 32": {"bits": 3, "block": 32},
    "2 bits, block 32": {"bits": 2, "block": 32},
}


def written(program: gw.Program, folder: Path) -> Path:
    """The program lowered and saved; the path of its model."""
    path: Path = gw.lower(program, "onnxruntime").save(folder).path
    return path


def by_peer(source: Path, folder: Path, block: int, level: int | None) -> Path:
    """A float32 model through onnxruntime's own 4-bit quantizer."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    folder.mkdir(parents=True, exist_ok=True)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), block_size=block, is_symmetric=False, accuracy_level=level
    )
    with silent():
        quantizer.process()
    onnx.save(quantizer.model.model, folder / "model.onnx")
    return folder / "model.onnx"


def megabytes(path: Path) -> float:
    """Size of a model with its weights."""
    return sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) / 1e6


def products(folder: Path, seconds: float) -> None:
    """One row of activations times the matrices of a decoder."""
    print("| one row times | float32 | " + " | ".join(FORMS) + " | onnxruntime's own, block 32 "
          "| its own, level 4 |\n" + "| --- |" + " ---: |" * (len(FORMS) + 3))  # fmt: skip
    for depth, out in MATRICES:
        torch.manual_seed(0)
        layer = torch.nn.Linear(depth, out, bias=False)
        program = gw.trace(layer.eval(), (torch.randn(2, depth),), {"input": {0: "batch"}})
        place = folder / f"{depth}x{out}"
        paths = {"float32": written(program, place / "float32")}
        for name, options in FORMS.items():
            paths[name] = written(gw.passes.quantize.Rtn(**options)(program), place / name)
        paths["own"] = by_peer(paths["float32"], place / "own", 32, None)
        paths["own 4"] = by_peer(paths["float32"], place / "own4", 32, 4)
        x = {"input": np.random.default_rng(0).standard_normal((1, depth), dtype=np.float32)}
        calls = {name: caller(session(path), x) for name, path in paths.items()}
        print(f"| {depth}x{out} | " + cells(alternate(calls, seconds)) + " |", flush=True)


def cells(timings: dict[str, Timing]) -> str:
    """Medians, and speed-ups over the first."""
    base = next(iter(timings.values())).median_ms
    return " | ".join(f"{t.median_ms:.2f} ms {base / t.median_ms:.2f}x" for t in timings.values())


def fidelity(path: Path, reference: torch.Tensor) -> tuple[float, float]:
    """Mean cosine and share of unchanged nearest neighbours over the held-out sentences."""
    one = session(path)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        feeds = dict(zip(encoder.NAMES, (t.numpy() for t in tensors), strict=True))
        result: Any = caller(one, feeds)()
        return torch.from_numpy(result[0])

    found = encoder.embeddings(run, encoder.held_out())
    return encoder.mean_cosine(reference, found), encoder.retrieval(reference, found)


def whole_encoder(folder: Path, seconds: float, shapes: list[tuple[int, int]]) -> None:
    """Sizes, fidelity and speed of the encoder."""
    program = encoder.program()
    paths = {"float32": written(program, folder / "float32")}
    for name, options in FORMS.items():
        paths[name] = written(gw.passes.quantize.Rtn(**options)(program), folder / name)
    for block in (32, 128):
        for level in (None, 4):
            name = f"onnxruntime's own, block {block}{', level 4' if level else ''}"
            paths[name] = by_peer(paths["float32"], folder / name, block, level)
    reference = encoder.embeddings(program, encoder.held_out())
    whole = megabytes(paths["float32"])
    print("\n| artifact | file MB | of float32 | mean cosine | same nearest neighbour |\n"
          "| --- | ---: | ---: | ---: | ---: |")  # fmt: skip
    for name, path in paths.items():
        cosine, same = fidelity(path, reference)
        size = megabytes(path)
        print(f"| {name} | {size:.1f} | {size / whole:.3f} | {cosine:.4f} | {same:.3f} |",
              flush=True)  # fmt: skip
    sessions = {name: session(path) for name, path in paths.items()}
    rows: dict[str, list[str]] = {name: [] for name in sessions}
    for batch, length in shapes:
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length), dtype=np.int64)
        feeds = dict(zip(encoder.NAMES, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
        timings = alternate({n: caller(s, feeds) for n, s in sessions.items()}, seconds)
        for name, cell in zip(timings, cells(timings).split(" | "), strict=True):
            rows[name].append(cell)
        print(f"timed {batch}x{length}", file=sys.stderr)
    print("\n| median, speed-up over float32 | " + " | ".join(f"{b}x{s}" for b, s in shapes) + " |"
          "\n| --- |" + " ---: |" * len(shapes))  # fmt: skip
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(found) + " |")


def main() -> None:
    """Builds everything, times it in turn, prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0, help="per row or shape")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-int4")
    parser.add_argument("--only", default="", help="shapes of the encoder, as 8x128,1x16")
    parser.add_argument("--part", choices=("products", "encoder"), help="one of the two alone")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # the peer tells of every node
    torch.set_num_threads(THREADS)
    print(f"{THREADS} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}\n")
    if arguments.part != "encoder":
        products(arguments.out, arguments.seconds)
    if arguments.part == "products":
        return
    pairs = [s.split("x") for s in arguments.only.split(",") if s]
    chosen = [(int(batch), int(length)) for batch, length in pairs] or SHAPES
    whole_encoder(arguments.out / "encoder", arguments.seconds, chosen)


if __name__ == "__main__":
    main()
