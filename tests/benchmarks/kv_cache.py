"""What a cache of keys and values in fewer bits costs a pretrained decoder, and steps on a CPU.

    python tests/benchmarks/kv_cache.py [--no-speed]

SmolLM2-135M-Instruct, float32 weights. Scales are found on 2,048 tokens of docstrings of Python's
standard library; perplexity, the share of equal most probable tokens and the divergence KL(float
cache | quantized cache) are measured on 2,048 tokens of other modules, in windows of 512. Times are
seconds of the processor in one thread, artifact and transformers in turns, medians.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
import time
from typing import Any

import _paths  # noqa: F401  puts the tests' shared modules on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from models import smollm2
from torch import Tensor

import graphwright as gw
from graphwright.backends.triton.compiled import FusedModule
from graphwright.backends.triton.fuse import fuse
from graphwright.ir.context import Context
from graphwright.ir.generation.trace import trace_decoder
from graphwright.passes.registry import find_pass

TOKENS, WINDOW, STEPS = 2048, 512, 16
SEEN = ("argparse", "decimal", "threading", "pathlib", "inspect")
HELD_OUT = ("unittest.mock", "subprocess", "collections", "typing", "statistics", "random",
            "zipfile", "shutil")  # fmt: skip
CACHES: tuple[dict[str, Any], ...] = (
    {"bits": 16}, {"bits": 8}, {"bits": 8, "scales": "token"}, {"bits": 4},
    {"bits": 4, "scales": "token"}, {"bits": 4, "scales": "channel"},
)  # fmt: skip


def docstrings(names: tuple[str, ...]) -> str:
    """Docstrings of modules and of what they define, by name."""
    found = []
    for name in names:
        module = importlib.import_module(name)
        found.append(module.__doc__ or "")
        for _, member in sorted(vars(module).items()):
            text = getattr(member, "__doc__", None)
            if isinstance(text, str) and getattr(member, "__module__", None) == name:
                found.append(text)
    return "\n\n".join(found)


@torch.no_grad()
def log_probabilities(program: gw.Program, windows: list[Tensor]) -> Tensor:
    """Of every next token in every window: (tokens, vocabulary)."""
    logits = [program.run_flat(program.bind(input_ids=ids))[0][0, :-1] for ids in windows]
    return torch.log_softmax(torch.cat(logits).float(), -1)


def accuracy(program: gw.Program, seen: list[Tensor], windows: list[Tensor]) -> None:
    """Prints a row for every cache."""
    targets = torch.cat([ids[0, 1:] for ids in windows])[:, None]
    base = log_probabilities(program, windows)
    context = Context(calibration=[{"input_ids": ids} for ids in seen])
    for options in ({}, *CACHES):
        found = base
        if options:
            made = find_pass("quantize.kv_cache")(**options).execute(program, context).program
            found = log_probabilities(made, windows)
        perplexity = math.exp(-float(found.gather(1, targets).double().mean()))
        same = float((found.argmax(-1) == base.argmax(-1)).double().mean())
        divergence = float((base.exp() * (base - found)).sum(-1).double().mean())
        print(f"{options or 'float32'}: perplexity {perplexity:.3f}, same {same:.2%}, "
              f"KL {divergence:.2e}", flush=True)  # fmt: skip


def speed(program: gw.Program, model: Any, ids: Tensor) -> None:
    """Prints milliseconds of a prompt and of a step behind it."""
    torch.set_num_threads(1)
    compiled = FusedModule(fuse(program))
    runner, count = compiled.runner(), torch.tensor([ids.shape[1]])
    taken: dict[str, list[float]] = {
        name: [] for name in ("prompt", "step", "prompt hf", "step hf")
    }
    for _ in range(3):
        runner.start(1, ids.shape[1] + STEPS)
        taken["prompt"].append(seconds(lambda: runner.run(ids, count)))
        past = transformers.DynamicCache()
        taken["prompt hf"].append(seconds(lambda p=past: by_transformers(model, ids, p)))
        for step in range(STEPS):
            token = ids[:, step : step + 1]
            taken["step"].append(seconds(lambda t=token: runner.run(t, torch.tensor([1]))))
            taken["step hf"].append(seconds(lambda t=token, p=past: by_transformers(model, t, p)))
    for name, found in taken.items():
        print(f"{name}: {statistics.median(found) * 1e3:.1f} ms")


def seconds(call: Any) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


@torch.no_grad()
def by_transformers(model: Any, ids: Tensor, past: Any) -> None:
    model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-speed", action="store_true")
    asked = parser.parse_args()
    folder = smollm2.folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def windows(names: tuple[str, ...]) -> list[Tensor]:
        ids = torch.tensor([tokenizer(docstrings(names))["input_ids"][:TOKENS]])
        return list(ids.split(WINDOW, 1))

    program = trace_decoder(model, folder=folder, check=False)
    if not asked.no_speed:
        speed(program, model, windows(HELD_OUT)[0][:, :256])
    accuracy(program, windows(SEEN), windows(HELD_OUT))


if __name__ == "__main__":
    main()
