"""Memory of training: a side network (QST), LoRA on a 4-bit model (QLoRA), LoRA, all parameters.

    python tests/benchmarks/qst_memory.py [--layers 8] [--batch 4] [--length 256]

One decoder of SmolLM2-135M's width (576, 9 heads of 64, 3 of keys, inner width 1536) with random
weights, on the same batch of random tokens, the loss `next_token`, AdamW. Every way trains two
steps in a process of its own. Counted are the bytes of all stored tensors, of gradients, of the
optimizer's state, and of what autograd keeps for the backward at its most; measured is the peak of
the process above what it held before the model was there, and the median of the later steps' time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from models import transformers_nets

import graphwright as gw
from graphwright.ir.tune.hooks import Hooks, Moment
from graphwright.ir.tune.losses import next_token
from graphwright.ir.tune.working import Working, choose

MIB = 2**20
STEPS = 4
WORDS = 8192
RANK = 16


def programs(layers: int) -> dict[str, gw.Program]:
    """The ways to train, each as the program whose trainable parameters are trained."""
    torch.manual_seed(0)
    net = transformers_nets.llama(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        num_hidden_layers=layers, vocab_size=WORDS,
    )  # fmt: skip
    ids = torch.randint(0, WORDS, (2, 16))
    base = gw.trace(net, {"input_ids": ids}, dynamic={"input_ids": {0: "batch", 1: "length"}})
    adapt, blocks = gw.passes.adapt, ["model.layers.*"]
    coded = gw.passes.quantize.Nf4()(base, check=False)
    lora = adapt.Lora(rank=RANK, targets=blocks)
    return {
        "all parameters": base,
        "LoRA": lora(base, check=False),
        "QLoRA": lora(coded, check=False),
        "QST, adapter": adapt.SideNetwork()(coded, check=False),
        "QST, avg_pool": adapt.SideNetwork(downsample="avg_pool")(coded, check=False),
    }


def train(path: Path, batch: int, length: int) -> dict[str, float]:
    """Two steps and more of a saved program: figures in MiB, and seconds per step."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = resident("VmRSS")
    program = gw.load(path)
    model = Working(program, choose(program, None), Hooks([]), torch.device("cpu"))
    trained = model.trained
    del program
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    model.at = Moment(0, STEPS, 0, trained, optimizer)
    stored = {t.untyped_storage().data_ptr(): t for t in model.module.state_dict().values()}
    ids = torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in stored:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = next_token(model((ids,))[0][0], {"input_ids": ids})
    del loss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        next_token(model((ids,))[0][0], {"input_ids": ids}).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    state = sum(t.nbytes for row in optimizer.state.values() for t in row.values())
    return {
        "trainable": float(sum(p.numel() for p in trained.values())),
        "weights": sum(t.nbytes for t in stored.values()) / MIB,
        "gradients": sum(p.grad.nbytes for p in trained.values() if p.grad is not None) / MIB,
        "optimizer": state / MIB,
        "kept": sum(kept.values()) / MIB,
        "peak": (resident("VmHWM") - start) / MIB,
        "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2],
    }


def resident(line: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS), or at its most (VmHWM)."""
    for row in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if row.startswith(line):
            return int(row.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {line}")


def report(rows: dict[str, dict[str, float]]) -> None:
    columns = ("weights", "gradients", "optimizer", "kept", "counted", "peak")
    print("| way | trained | " + " | ".join(f"{c} MiB" for c in columns) + " | s/step | factor |")
    print("| --- |" + " ---: |" * (len(columns) + 3))
    for row in rows.values():
        row["counted"] = sum(row[c] for c in columns[:4])
    least = rows["QST, adapter"]["counted"]
    for name, row in rows.items():
        cells = " | ".join(f"{row[c]:.1f}" for c in columns)
        print(f"| {name} | {row['trainable']:,.0f} | {cells} | {row['seconds']:.2f} | "
              f"{row['counted'] / least:.2f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--one", type=Path, help="a saved program: train it, print its figures")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(train(given.one, given.batch, given.length)))
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, program in programs(given.layers).items():
            files[name] = Path(folder, f"{len(files)}.pt2")
            program.save(files[name])
        for name, file in files.items():
            command = [sys.executable, __file__, "--one", str(file), "--batch", str(given.batch),
                       "--length", str(given.length)]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
    report(rows)


if __name__ == "__main__":
    main()
