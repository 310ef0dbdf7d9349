"""Greedy tokens of the pretrained SmolLM2 in float32: transformers against what we make of it.

    python tests/benchmarks/llm_tokens.py [--tokens 128] [--prompts 20] [--out out/bench-tokens]
        [--backend onnxruntime|triton]

A prompt counts as equal when its tokens are, up to a place where transformers' own two best logits
are less than 1e-3 apart: there the order of sums decides, and both are right. The client is
onnxruntime-genai on the same folder; ragged means batches of four prompts. "Kept cache" generates
half of the tokens, takes a text more, and goes on. The last table is of a cold start: seconds to
open the folder, and from there to the first token of an answer (`graphwright chat`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _paths  # noqa: F401  puts tests/ on the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from models import smollm2

import graphwright as gw
from graphwright.backends.base import Compiled

CLOSE = 1e-3
"""Logits that are no further apart than this are a tie."""

BEGINNINGS = (
    "The capital of France is", "def fibonacci(n):\n", "Water boils at", "Once upon a time,",
    "The three laws of motion say that", "1, 1, 2, 3, 5, 8,", "Dear Sir or Madam,\n\n",
    "In 1969, for the first time,", "Photosynthesis is the process by which", "import os\n\n",
)  # fmt: skip
QUESTIONS = (
    "What is the largest planet?", "Write a haiku about rain.", "Explain recursion to a child.",
    "Translate 'good morning' into Spanish.", "List four fruits that are red.",
    "Why is the sky blue?", "How do I boil an egg?", "What is 17 plus 26?",
    "Summarize the water cycle in one sentence.", "Give me a name for a cat.",
)  # fmt: skip
MORE = " And then, to everyone's surprise,"


def prompts(model: Compiled) -> list[list[int]]:
    """Token ids of the beginnings of texts, and of questions in the chat template."""
    tokenizer = model.language_model.tokenizer
    assert tokenizer is not None
    asked = [tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    texts = [tokenizer.encode(text) for text in BEGINNINGS]
    return [ids for pair in zip(texts, asked, strict=True) for ids in pair]


class Reference:
    """transformers on the folder: greedy tokens, and where its choice was a tie."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens, the stop token too."""
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        return [int(i) for i in out[0, len(prompt) :]]

    def agrees(self, prompt: Sequence[int], theirs: Sequence[int], ours: Sequence[int]) -> bool:
        """Whether `ours` are the tokens, up to a tie."""
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        if at is None:
            return len(theirs) == len(ours)
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *theirs[:at]]])).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        return bool(first - second <= CLOSE)


def compiled(out: Path, backend: str) -> Compiled:
    """The model in float32; for ONNX Runtime saved, and opened again."""
    if backend != "onnxruntime":
        return gw.lower(smollm2.program(), backend)
    if not (out / "model.onnx").exists():
        gw.lower(smollm2.program(), backend).save(out)
    opened = gw.load(out)
    assert isinstance(opened, Compiled)
    return opened


def by_us(model: Compiled, rows: list[list[int]], count: int, batch: int) -> list[list[int]]:
    """Tokens of every prompt, in batches of so many."""
    found: list[list[int]] = []
    for at in range(0, len(rows), batch):
        done = model.generate(rows[at : at + batch], max_new_tokens=count, do_sample=False)
        assert isinstance(done, list)
        found += [each.ids for each in done]
    return found


def by_client(folder: Path, rows: list[list[int]], count: int) -> list[list[int]]:
    """Tokens of every prompt by onnxruntime-genai, the stop token left out."""
    import onnxruntime_genai as og

    client = og.Model(str(folder))
    found = []
    for prompt in rows:
        params = og.GeneratorParams(client)
        params.set_search_options(max_length=len(prompt) + count, do_sample=False)
        run = og.Generator(client, params)
        run.append_tokens(prompt)
        while not run.is_done():
            run.generate_next_token()
        found.append(run.get_sequence(0).tolist()[len(prompt) :])
    return found


def continued(
    model: Compiled, reference: Reference, row: list[int], count: int
) -> tuple[list[int], list[int], list[int]]:
    """(prompt, transformers' tokens, ours) behind a text that a kept cache has taken in."""
    talk = model.conversation()
    talk.append(row)
    talk.generate(max_new_tokens=count // 2, do_sample=False)
    talk.append(MORE)
    prompt = list(talk.tokens[0])
    done = talk.generate(max_new_tokens=count // 2, do_sample=False)
    assert not isinstance(done, list)
    return prompt, reference.tokens(prompt, count // 2), done.ids


def main(arguments: Sequence[str]) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/bench-tokens"))
    parser.add_argument("--backend", default="onnxruntime")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder = smollm2.folder()
    model = compiled(asked.out, asked.backend)
    rows = prompts(model)[: asked.prompts]
    reference = Reference(folder)
    expected = [reference.tokens(row, asked.tokens) for row in rows]
    stop = set(model.generation.eos) if model.generation else set()
    table: dict[str, list[bool]] = {}

    def judge(name: str, found: list[list[int]]) -> None:
        table[name] = [
            reference.agrees(*each) for each in zip(rows, expected, found, strict=True)
        ]  # fmt: skip

    judge(f"{asked.backend}, batch 1", by_us(model, rows, asked.tokens, 1))
    judge(f"{asked.backend}, ragged batch 4", by_us(model, rows, asked.tokens, 4))
    kept = [continued(model, reference, row, asked.tokens) for row in rows[::4]]
    table[f"{asked.backend}, kept cache"] = [reference.agrees(*each) for each in kept]
    if asked.backend == "onnxruntime":
        found = by_client(asked.out, rows, asked.tokens)
        ends = [
            [*ids, theirs[-1]] if theirs[-1] in stop and len(ids) < len(theirs) else ids
            for ids, theirs in zip(found, expected, strict=True)
        ]
        judge("onnxruntime-genai, batch 1", ends)
    print(f"| {asked.tokens} greedy tokens, float32 | prompts equal to transformers |")
    print("| --- | --- |")
    for name, equal in table.items():
        print(f"| {name} | {sum(equal)} of {len(equal)} |")
    if asked.backend == "onnxruntime":
        print_start(asked.out)
    return 0 if all(all(equal) for equal in table.values()) else 1


def print_start(folder: Path) -> None:
    """Times of a cold start, in this process: libraries are loaded, the model is not."""
    start = time.perf_counter()
    model = gw.load(folder)
    assert isinstance(model, Compiled)
    opened = time.perf_counter() - start
    answer = model.conversation().say("Why is the sky blue?", max_new_tokens=64)
    print(f"\n| opening | first token ({answer.prompt_tokens} tokens) | then tokens/s |")
    print("| --- | --- | --- |")
    speed = answer.tokens_per_second or 0.0
    print(f"| {opened:.2f} s | {answer.first_seconds:.2f} s | {speed:.1f} |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
