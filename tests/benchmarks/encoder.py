"""The pretrained sentence encoder: our fp32 and int8 artifacts against their peers, in one run.

    python tests/benchmarks/encoder.py [--seconds 6] [--out out/bench] [--only 8x128,...]

Peers: torch eager; a plain `torch.onnx.export`; that file through onnxruntime's transformers
optimizer; and through `quantize_dynamic`, with its defaults and per channel. All run on two threads
(`OMP_NUM_THREADS`), in turn, call by call; the table shows medians and ratios to the plain export.
Fidelity is the mean cosine of pooled embeddings of the 96 held-out texts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parents[2]

import numpy as np
import onnxruntime
import torch
from benchmarks.cpu_sessions import caller, session, silent

from graphwright.job.latency import alternate

THREADS = int(os.environ["OMP_NUM_THREADS"])
SHAPES = [(batch, length) for batch in (1, 8) for length in (16, 64, 128, 256)]
NAMES = ("input_ids", "attention_mask", "token_type_ids")
INPUTS = """
model:
  inputs:
    input_ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 30522]}
    attention_mask: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [1, 2]}
    token_type_ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 2]}
"""
OURS = {
    "graphwright fp32": ("passes: [cleanup.fold_constants, "
                         "cleanup.eliminate_common_subexpressions, cleanup.remove_identities]"),
    "graphwright int8 (dynamic)": ("passes: [quantize.smoothquant, "
                                   "{quantize.int8: {activations: dynamic}}]"),
    "graphwright int8 (static)": ("passes: [quantize.smoothquant, "
                                  "{quantize.int8: {activations: static}}]"),
}  # fmt: skip


def plain_export(model: torch.nn.Module, path: Path) -> None:
    """`torch.onnx.export` with dynamic batch and sequence."""
    batch, seq = torch.export.Dim("batch", min=1), torch.export.Dim("seq", min=1, max=512)
    example = {name: torch.ones(8, 64, dtype=torch.int64) for name in NAMES}
    with silent(), torch.no_grad():
        exported = torch.onnx.export(
            model, (), kwargs=example, dynamo=True, opset_version=21, verbose=False,
            dynamic_shapes={name: {0: batch, 1: seq} for name in NAMES},
        )  # fmt: skip
        assert exported is not None
        exported.save(str(path))


def peers(model: torch.nn.Module, folder: Path) -> dict[str, Path]:
    """Artifacts of the peers; one that fails is said and left out."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.optimizer import optimize_model

    found = {"plain torch.onnx.export": folder / "plain.onnx"}
    plain_export(model, found["plain torch.onnx.export"])
    plain, prepared = str(folder / "plain.onnx"), str(folder / "prepared.onnx")

    def transformers_optimizer(path: Path) -> None:
        with silent():
            optimize_model(plain, "bert", num_heads=12, hidden_size=384).save_model_to_file(
                str(path)
            )

    def dynamic(path: Path, per_channel: bool) -> None:
        if not Path(prepared).exists():
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, str(path), per_channel=per_channel, weight_type=QuantType.QInt8)

    makers: dict[str, Callable[[Path], None]] = {
        "ORT transformers optimizer": transformers_optimizer,
        "quantize_dynamic": lambda path: dynamic(path, False),
        "quantize_dynamic per channel": lambda path: dynamic(path, True),
    }
    for name, make in makers.items():
        path = folder / f"{name.replace(' ', '_')}.onnx"
        try:
            make(path)
            found[name] = path
        except Exception as error:
            print(f"{name}: fails: {str(error).splitlines()[0][:100]}")
    return found


def ours(data: Path, folder: Path) -> dict[str, Path]:
    """Our artifacts, through the public command's own function."""
    import graphwright as gw

    found = {}
    for name, passes in OURS.items():
        spec = folder / "spec.yaml"
        spec.write_text(
            f"version: 1\n{INPUTS}\ncalibration: {{data: {data}/calibration.npz}}\n{passes}\n"
            "lower: [onnxruntime]\n"
        )
        out = folder / name.replace(" ", "_").replace("(", "").replace(")", "")
        begin = time.perf_counter()
        gw.optimize(data / "all-MiniLM-L6-v2", spec, out=out)
        print(f"{name}: compiled in {time.perf_counter() - begin:.1f} s")
        found[name] = out / "model.onnx"
    return found


def inputs(batch: int, length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random tokens, nothing masked."""
    tokens = np.random.default_rng(0).integers(1000, 30000, (batch, length), dtype=np.int64)
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }


def callers(
    model: torch.nn.Module,
    sessions: dict[str, onnxruntime.InferenceSession],
    shape: tuple[int, int],
) -> dict[str, Callable[[], object]]:
    """Every candidate as a call without arguments on the same inputs."""
    arrays = inputs(*shape)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def eager() -> object:
        with torch.inference_mode():
            return model(**tensors)

    return {"torch eager": eager} | {name: caller(one, arrays) for name, one in sessions.items()}


def cosine(model: torch.nn.Module, one: onnxruntime.InferenceSession, data: Path) -> float:
    """Mean cosine of pooled embeddings to the original's, text by text."""
    from compare import pool
    from prepare import load_tokenizer, tokenize

    tokenizer = load_tokenizer(data / "all-MiniLM-L6-v2")
    texts = (data / "held_out.txt").read_text(encoding="utf-8").splitlines()
    wanted = {item.name for item in one.get_inputs()}
    total = 0.0
    for start in range(0, len(texts), 8):
        arrays = tokenize(tokenizer, texts[start : start + 8])
        with torch.no_grad():
            before = model(**{k: torch.from_numpy(v) for k, v in arrays.items()})[0].numpy()
        after = one.run(None, {k: v for k, v in arrays.items() if k in wanted})[0]
        mask = arrays["attention_mask"]
        total += float((pool(before, mask) * pool(after, mask)).sum())
    return total / len(texts)


def profile(path: Path, shape: tuple[int, int]) -> list[tuple[str, float]]:
    """Share of the time by kernel, largest first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    one = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in one.get_inputs()}
    for _ in range(10):
        one.run(None, {k: v for k, v in inputs(*shape).items() if k in wanted})
    events = json.loads(Path(one.end_profiling()).read_text())
    times: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            times[kind] = times.get(kind, 0.0) + event["dur"]
    total = sum(times.values())
    return sorted(((k, t / total) for k, t in times.items()), key=lambda item: -item[1])


def main() -> None:
    """Builds everything, times it in turn, prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    parser.add_argument("--only", default="", help="shapes, as 8x128,1x16")
    arguments = parser.parse_args()
    from prepare import main as prepare

    data = arguments.out / "data"
    arguments.out.mkdir(parents=True, exist_ok=True)
    prepare(data)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(data / "all-MiniLM-L6-v2").eval()
    torch.set_num_threads(THREADS)
    paths = peers(model, arguments.out) | ours(data, arguments.out)
    sessions = {name: session(path) for name, path in paths.items()}
    print(
        f"\n{THREADS} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}\n"
    )
    print("| artifact | file MB | mean cosine |\n| --- | ---: | ---: |")
    for name, one in sessions.items():
        size = paths[name].stat().st_size / 1e6
        data_file = Path(f"{paths[name]}.data")
        size += data_file.stat().st_size / 1e6 if data_file.exists() else 0.0
        print(f"| {name} | {size:.1f} | {cosine(model, one, data):.5f} |", flush=True)
    chosen = [tuple(int(n) for n in s.split("x")) for s in arguments.only.split(",") if s] or SHAPES
    rows: dict[str, list[str]] = {name: [] for name in ("torch eager", *sessions)}
    for shape in chosen:
        timings = alternate(callers(model, sessions, (shape[0], shape[1])), arguments.seconds)
        plain = timings["plain torch.onnx.export"].median_ms
        for name, timing in timings.items():
            rows[name].append(f"{timing.median_ms:.1f} ms {plain / timing.median_ms:.2f}x")
        print(f"timed {shape[0]}x{shape[1]}", file=sys.stderr)
    print("\n| median, speed-up over the plain export | "
          + " | ".join(f"{b}x{s}" for b, s in chosen) + " |")  # fmt: skip
    print("| --- |" + " ---: |" * len(chosen))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("graphwright fp32", "graphwright int8 (static)"):
        shares = ", ".join(
            f"{kind} {share:.0%}" for kind, share in profile(paths[name], (8, 128))[:8]
        )
        print(f"\nWhere the time of {name} goes at 8x128: {shares}.")


if __name__ == "__main__":
    main()
