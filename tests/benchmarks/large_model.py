"""Memory of `optimize` against the size of a model: random decoders of Llama's shape, bf16 shards.

    python tests/benchmarks/large_model.py 0.1 0.5 1            # billions of parameters
    python tests/benchmarks/large_model.py --stages 0.5         # the largest of every stage

Every run is a process of its own, which writes an int4 ONNX folder; this one samples what the
kernel says of it, 50 times a second. `anonymous` is what the process holds; `mapped` are pages of
files, which the kernel drops when it needs the room.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {  # hidden size, layers, inner size, heads
    "0.02": (256, 4, 688, 4),
    "0.1": (768, 12, 2048, 12),
    "0.25": (1152, 14, 3072, 12),
    "0.5": (1536, 16, 4096, 16),
    "1": (2048, 20, 5632, 16),
    "3": (3200, 26, 8640, 32),
    "7": (4096, 32, 11008, 32),
    "13": (5120, 40, 13824, 40),
}
VOCABULARY = 16000
SHARD_BYTES = 500_000_000
SPEC = """version: 1
passes:
  - quantize.rtn: {bits: 4, block: 32, targets: ["*", "!lm_head"]}
lower:
  - onnxruntime: {external_data_mb: 50}
"""
EVERY_S = 0.02


@dataclass
class Sample:
    """What the kernel said of the process at one time: bytes."""

    time: float
    anonymous: int
    mapped: int


def tensors(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a model, in the order of its layers."""
    hidden, layers, inner, _ = SHAPES[size]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for index in range(layers):
        layer = f"model.layers.{index}"
        for name in "qkvo":
            yield f"{layer}.self_attn.{name}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def make_folder(size: str, folder: Path) -> int:
    """Writes config.json and sharded weights, one shard in memory at a time; the parameters."""
    import torch
    from safetensors.torch import save_file

    hidden, layers, inner, heads = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = []
    shard: dict[str, Any] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, shape in tensors(size):
        is_norm = len(shape) == 1
        made = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator) * 0.02
        shard[name] = made.to(torch.bfloat16)
        total += made.numel()
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    places = {n: f"model-{i:05d}.safetensors" for i, names in enumerate(shards) for n in names}
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def child(folder: str, spec: str, out: str, log: str) -> None:
    """One run; says when its stages begin and end."""
    from graphwright.job.pipeline import JobSettings, run
    from graphwright.job.progress import Progress
    from graphwright.specs.spec import load_spec

    stage = Progress.stage

    @contextlib.contextmanager
    def told(self: Progress, name: str) -> Iterator[None]:
        with Path(log).open("a") as file:
            file.write(json.dumps([time.monotonic(), name]) + "\n")
        try:
            with stage(self, name):
                yield
        finally:
            with Path(log).open("a") as file:
                file.write(json.dumps([time.monotonic(), f"behind {name}"]) + "\n")

    Progress.stage = told  # type: ignore[method-assign]
    run(folder, load_spec(spec), JobSettings(out=Path(out), quiet=True))


def sampled(pid: int) -> Sample | None:
    """What the kernel says of a process; None when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    if "RssAnon" not in found:
        return None
    anonymous, mapped = (int(found[name]) * 1024 for name in ("RssAnon", "RssFile"))
    return Sample(time.monotonic(), anonymous, mapped)


def measured(folder: Path, work: Path) -> tuple[list[Sample], list[tuple[float, str]], int, float]:
    """Samples of one run, its stages, the largest resident set (VmHWM) and seconds."""
    spec, log = work / "spec.yaml", work / "stages"
    spec.write_text(SPEC)
    begin = time.monotonic()
    command = [sys.executable, __file__, "--child", str(folder), str(spec), str(work / "out"),
               str(log)]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    samples = []
    peak = 0
    while process.poll() is None:
        sample = sampled(process.pid)
        if sample is not None:
            samples.append(sample)
            peak = max(peak, sample.anonymous + sample.mapped)
        time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    stages = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    return samples, stages, peak, time.monotonic() - begin


def by_stage(samples: list[Sample], stages: list[tuple[float, str]]) -> None:
    """Prints the largest of every stage."""
    bounds = [(0.0, "start"), *stages, (float("inf"), "")]
    for (begin, name), (end, _) in itertools.pairwise(bounds):
        within = [s for s in samples if begin <= s.time < end]
        if within:
            most = max(s.anonymous for s in within) / 1e6
            mapped = max(s.mapped for s in within) / 1e6
            length = within[-1].time - within[0].time
            print(f"  {name:28s} {length:7.1f} s  anonymous {most:8.0f} MB  mapped {mapped:8.0f}")


def main() -> None:
    """Prints a row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["0.1"])
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for models and results")
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    print("| size | parameters | stored, MB | written, MB | anonymous, MB | all resident, MB | s |")
    print("|---|---|---|---|---|---|---|")
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.work) as name:
            work = Path(name)
            total = make_folder(size, work / "model")
            samples, stages, peak, seconds = measured(work / "model", work)
            written = sum(f.stat().st_size for f in (work / "out").rglob("*") if f.is_file())
        most = max(s.anonymous for s in samples)
        figures = (2 * total, written, most, peak)
        row = " | ".join(f"{figure / 1e6:.0f}" for figure in figures)
        print(f"| {size} B | {total:,} | {row} | {seconds:.0f} |", flush=True)
        if given.stages:
            by_stage(samples, stages)


if __name__ == "__main__":
    main()
