"""What a training step remembers: layers that keep few rows, few channels, or few entries.

    python tests/benchmarks/adapters_memory.py          2 minutes on a core

The pretrained sentence encoder, dropout off, all of its linear layers. "Kept" is what autograd
remembers of one forward pass of 16 texts of 64 tokens, beyond what is stored anyway: counted, not
timed, so every run gives the same numbers. Attention, norms and activations keep their part in
every row. "State" is gradients and AdamW's two moments.
"""

from __future__ import annotations

import os

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.adapters_encoder import Classifier, trace
from benchmarks.step_memory import saved_bytes
from torch import Tensor

import graphwright as gw
from graphwright.ir.tune.hooks import Hooks, Moment
from graphwright.ir.tune.working import Working
from graphwright.passes import adapt
from graphwright.passes.training import training_hooks

LAYERS = ["*.query", "*.key", "*.value", "*.dense"]
OUTPUTS = ["*.output.dense"]

ROWS: dict[str, Callable[[gw.Program], gw.Program]] = {
    "full": lambda p: p,
    "full, wta_crs 30%": lambda p: adapt.WtaCrs(targets=LAYERS)(p, check=False),
    "full, wta_crs 10%": lambda p: adapt.WtaCrs(targets=LAYERS, share=0.1)(p, check=False),
    "lora 8": lambda p: adapt.Lora(targets=LAYERS, rank=8)(p, check=False),
    "lora 8, wta_crs 30%": lambda p: adapt.WtaCrs(targets=LAYERS)(
        adapt.Lora(targets=LAYERS, rank=8)(p, check=False), check=False
    ),
    "s2ft 3%": lambda p: adapt.S2ft(targets=OUTPUTS, share=0.03)(p, check=False),
    "s2ft 10%": lambda p: adapt.S2ft(targets=OUTPUTS, share=0.1)(p, check=False),
    "sara, entries below 0.002": lambda p: adapt.Sara(targets=LAYERS)(p, check=False),
}  # fmt: skip


def kept(program: gw.Program, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes that a forward pass in training keeps, and the number of trained parameters."""
    trained = program.trainable()
    hooks = Hooks(training_hooks(program))
    working = Working(program, list(trained), hooks, torch.device("cpu"))
    optimizer = torch.optim.SGD(list(working.trained.values()), lr=0.0)
    working.at = Moment(0, 1, 0, working.trained, optimizer)
    inputs: Any = tuple(batch[spec.name] for spec in program.signature.inputs)
    there = list(working.module.state_dict().values())
    saved = saved_bytes(lambda: working(inputs), [*there, *inputs])
    return saved, sum(p.numel() for p in trained.values())


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ids = torch.randint(1000, 30000, (16, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = trace(Classifier(10, 0), batch)
    print("| trained | parameters | kept MiB | of full | state MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    whole = 0
    for name, make in ROWS.items():
        saved, trained = kept(make(program), batch)
        whole = whole or saved
        state = 3 * 4 * trained
        print(f"| {name} | {trained:,} | {saved / 2**20:.1f} | {saved / whole:.2f} "
              f"| {state / 2**20:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
