"""Seconds and peak memory of pruning ResNet-50 and BERT-base at full size, beside torch-pruning.

    pip install --no-deps -r tests/benchmarks/requirements.txt
    python tests/benchmarks/prune_large.py
    python tests/benchmarks/prune_large.py --ours --models resnet50

Every measurement is a process of its own: the model with random weights, traced (ours), then the
groups and a one-shot prune of half of all units by magnitude (ours: `prune.zig`, which also
checks the cut program against the masked one). Seconds are processor seconds of one thread, so
that other work on the machine does not count. Memory is the highest resident size after the
model is there, less the resident size before, plus the model: over the bytes of the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet50", "bert-base"])
    parser.add_argument("--ours", action="store_true", help="leave torch-pruning out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    print("| model | tool | groups s | groups + prune s | parameters left | peak / model |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for model in options.models:
        for tool in ["ours"] if options.ours else ["ours", "torch-pruning"]:
            command = [sys.executable, __file__, "--measure", model, tool]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {model} | {tool} | {done.stderr.strip().splitlines()[-1][:80]} | | | |")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {model} | {tool} | {row['groups']:.2f} | {row['total']:.2f} "
                f"| {row['left']:.2f} | {row['peak']:.2f} |", flush=True,
            )  # fmt: skip
    return 0


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The model at its published size with random weights, and its inputs."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "resnet50":
        resnet = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(num_labels=1000)
        )
        return resnet.eval(), {"pixel_values": torch.randn(2, 3, 224, 224)}
    config = transformers.BertConfig(num_labels=2)
    bert = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 30000, (2, 64))
    return bert.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(name: str, tool: str) -> dict[str, float]:
    """One row, in this process."""
    import torch

    torch.set_num_threads(1)
    model, inputs = build(name)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    before = sum(p.numel() for p in model.parameters())
    return (ours if tool == "ours" else theirs)(model, inputs, size, before)


def ours(model: Any, inputs: dict[str, Any], size: int, before: int) -> dict[str, float]:
    import graphwright as gw
    from graphwright.passes.prune.zig import Zig

    dynamic = {key: {0: "batch"} for key in inputs}
    program = gw.trace(model, inputs, dynamic=dynamic, check=False)
    del model
    Zig(sparsity=0.5).run(_tiny(), gw.Context())  # imports what it needs
    with Peak(size) as peak:
        start = time.process_time()
        gw.channel_groups(program)
        groups = time.process_time() - start
        smaller = Zig(sparsity=0.5).run(program, gw.Context()).program
        total = time.process_time() - start - groups
    left = sum(p.numel() for p in smaller.parameters().values()) / before
    return {"groups": groups, "total": total, "left": left, "peak": peak.ratio}


def _tiny() -> Any:
    import torch

    import graphwright as gw

    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return gw.trace(net.eval(), (torch.randn(2, 4),))


def theirs(model: Any, inputs: dict[str, Any], size: int, before: int) -> dict[str, float]:
    """As its README says: magnitude importance, ratio 0.5, the classifier and heads given."""
    import torch
    import torch_pruning as tp

    heads = {m.query: 12 for m in model.modules() if hasattr(m, "query")}
    heads |= {m.key: 12 for m in model.modules() if hasattr(m, "key")}
    heads |= {m.value: 12 for m in model.modules() if hasattr(m, "value")}
    classifier = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1:]
    with Peak(size) as peak:
        start = time.process_time()
        pruner = tp.pruner.MagnitudePruner(
            model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
            ignored_layers=classifier, num_heads=heads, prune_head_dims=False, prune_num_heads=True,
            head_pruning_ratio=0.5, output_transform=lambda out: out.logits.sum(),
        )  # fmt: skip
        groups = time.process_time() - start
        pruner.step()
        with torch.no_grad():
            model(**inputs)
        total = time.process_time() - start
    left = sum(p.numel() for p in model.parameters()) / before
    return {"groups": groups, "total": total, "left": left, "peak": peak.ratio}


class Peak:
    """Highest resident size within the block over the bytes of the model.

    What was resident at the start, less one model, is not counted: Python, torch, the trace.
    """

    def __init__(self, size: int) -> None:
        self.size, self.ratio, self._highest = size, 0.0, 0
        self._stop = threading.Event()

    def __enter__(self) -> Peak:
        gc.collect()
        self._start = self._highest = resident()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, resident())

    def __exit__(self, *_: object) -> None:
        self._highest = max(self._highest, resident())
        self._stop.set()
        self._watcher.join()
        self.ratio = 1 + (self._highest - self._start) / self.size


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
