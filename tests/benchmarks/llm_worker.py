"""One candidate of llm_speed.py, in a process and perhaps an environment of its own.

    python llm_worker.py KIND MODEL THREADS

Loads the model, says so in a line of JSON, and answers every line `round` with the times of a
prefill of 512 tokens and of 64 tokens behind them, greedily, over the cache. It imports nothing but
the candidate's own package.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, STEPS, SHORT = 512, 64, 16
ROOM = PROMPT + STEPS + SHORT


class Graphwright:
    """An artifact of ours."""

    needs = ("torch", "onnxruntime", "graphwright")

    def __init__(self, path: str, threads: int) -> None:
        import torch

        import graphwright as gw

        torch.set_num_threads(threads)
        compiled: Any = gw.load(path)
        self.torch, self.runner = torch, compiled.runner()

    def start(self, ids: list[int]) -> int:
        """Runs a prompt over an empty cache; the greedy token behind it."""
        self.runner.start(1, ROOM)
        return self.step_over(ids)

    def step_over(self, ids: list[int]) -> int:
        """Appends tokens; the greedy token behind them."""
        tensor = self.torch.tensor
        return int(self.runner.run(tensor([ids]), tensor([len(ids)])).argmax())

    def step(self, token: int) -> int:
        """Appends a token; the greedy one behind it."""
        return self.step_over([token])


class Transformers:
    """transformers with its own cache, float32."""

    needs = ("torch", "transformers")

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.past: Any = None

    def start(self, ids: list[int]) -> int:
        """See `Graphwright.start`."""
        self.past = None
        return self.step_over(ids)

    def step_over(self, ids: list[int]) -> int:
        """See `Graphwright.step_over`."""
        with self.torch.inference_mode():
            found = self.model(
                input_ids=self.torch.tensor([ids]), past_key_values=self.past, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        self.past = found.past_key_values
        return int(found.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        """See `Graphwright.step`."""
        return self.step_over([token])


class Optimum:
    """optimum-onnx's export, run by its own class."""

    needs = ("torch", "onnxruntime", "transformers")

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.torch, self.seen = torch, 0
        self.model = ORTModelForCausalLM.from_pretrained(path, session_options=options)
        self.past: Any = None

    def start(self, ids: list[int]) -> int:
        """See `Graphwright.start`."""
        self.past, self.seen = None, 0
        return self.step_over(ids)

    def step_over(self, ids: list[int]) -> int:
        """See `Graphwright.step_over`."""
        torch, self.seen = self.torch, self.seen + len(ids)
        found = self.model(
            input_ids=torch.tensor([ids]), past_key_values=self.past, use_cache=True,
            attention_mask=torch.ones(1, self.seen, dtype=torch.int64),
            position_ids=torch.arange(self.seen - len(ids), self.seen)[None],
        )  # fmt: skip
        self.past = found.past_key_values
        return int(found.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        """See `Graphwright.step`."""
        return self.step_over([token])


class Genai:
    """onnxruntime-genai on a folder that it or we made."""

    needs = ("onnxruntime_genai",)

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as genai

        self.genai = genai
        config = genai.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {
            "intra_op_num_threads": threads}}}}))  # fmt: skip
        self.model = genai.Model(config)
        self.generator: Any = None

    def start(self, ids: list[int]) -> int:
        """See `Graphwright.start`."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=ROOM, do_sample=False)
        self.generator = self.genai.Generator(self.model, params)
        self.generator.append_tokens(ids)
        return self.step(0)

    def step(self, token: int) -> int:
        """Runs the token that it chose itself, and chooses the next."""
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


class LlamaCpp:
    """llama.cpp on a GGUF file."""

    needs = ("llama_cpp",)

    def __init__(self, path: str, threads: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            path, n_ctx=ROOM, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

    def start(self, ids: list[int]) -> int:
        """See `Graphwright.start`."""
        self.model.reset()
        return self.step_over(ids)

    def step_over(self, ids: list[int]) -> int:
        """See `Graphwright.step_over`."""
        self.model.eval(ids)
        return int(self.model.sample(temp=0.0))

    def step(self, token: int) -> int:
        """See `Graphwright.step`."""
        return self.step_over([token])


KINDS: dict[str, Any] = {
    "graphwright": Graphwright, "transformers": Transformers, "optimum": Optimum, "genai": Genai,
    "llama.cpp": LlamaCpp,
}  # fmt: skip


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def one_round(candidate: Any, ids: list[int]) -> dict[str, float]:
    """Milliseconds of a prefill, and of a token behind it."""
    start = time.perf_counter()
    token = candidate.start(ids)
    middle = time.perf_counter()
    for _ in range(STEPS):
        token = candidate.step(token)
    end = time.perf_counter()
    return {"prefill": 1e3 * (middle - start), "decode": 1e3 * (end - middle) / STEPS}


def main() -> None:
    """Loads, then answers rounds until the input ends."""
    kind, path, threads = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    draw = random.Random(0)
    ids = [draw.randrange(1000, 40000) for _ in range(PROMPT)]
    for name in KINDS[kind].needs:
        importlib.import_module(name)
    start = time.perf_counter()
    candidate = KINDS[kind](path, int(threads))
    loaded = time.perf_counter()
    candidate.start(ids[:SHORT])
    first = time.perf_counter()
    # others print to stdout too
    answer = {"load": loaded - start, "first": first - loaded}
    print("@" + json.dumps(answer), flush=True)
    for line in sys.stdin:
        if line.strip() == "round":
            answer = {**one_round(candidate, ids), "peak_mb": peak_mb()}
            print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
