"""What each way to make a pretrained language model small costs: perplexity, tokens, bytes.

    python tests/benchmarks/llm_quality.py [--only NAME,...] [--out out/bench-llm] [--model FOLDER]

SmolLM2-135M-Instruct. Every row is lowered to ONNX Runtime and measured as the artifact runs: its
perplexity on 8,192 tokens of held-out English (docstrings of Python's modules, READMEs of installed
packages; no module and no package of it is calibrated on), in windows of 512; and the share of 64
greedy steps of transformers behind each of 20 held-out texts, 32 tokens each, at which it names the
same token. Size is that of the model's files. A row that is below `--out` already is measured
again, but not made again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _paths

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmarks import prose
from models import smollm2

import graphwright as gw
from graphwright.evaluation.scoring import IGNORED_LABEL, Scorer, scorer_of
from graphwright.evaluation.texts import padded, text_inputs
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches, load_data
from graphwright.ir.files import load_model
from graphwright.job.build import build_program
from graphwright.passes.registry import find_pass
from graphwright.specs.sections import ModelSection

WINDOW = 512
PROMPTS, PROMPT, STEPS = 20, 32, 64
PADDING = 1
"""A token of the vocabulary, the start of a message, that no text here has."""
BODY = ["model.layers.*"]
HEAD_IN_8 = ("quantize.rtn", {"bits": 8, "block": 32, "targets": ["!model.layers.*"]})
Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A named chain of passes behind that of the row `start`."""

    name: str
    steps: tuple[Step, ...]
    start: str = ""


def four(name: str, id: str, **options: Any) -> Row:
    return Row(name, ((id, {"bits": 4, "block": 32, **options}),))


def vptq(bits: int, **options: Any) -> Row:
    """Codebooks in the blocks; the tied table and head, of which VPTQ takes none, in 8 bits."""
    return Row(f"{bits} bits VPTQ", (("quantize.vptq", {**options, "targets": BODY}), HEAD_IN_8))


def pv(start: str) -> Row:
    tune = {"loss": "kl", "steps": 40}
    return Row(f"{start} + PV", (("quantize.pv", {"tune": tune}),), start)


EORA: Step = ("compensate.eora", {"rank": 32})
ROWS = (
    Row("fp32", ()),
    Row("int8 weights", (("quantize.rtn", {"bits": 8, "block": 32}),)),
    Row("int8 products", (("quantize.smoothquant", {}), ("quantize.int8", {}))),
    four("int4 RTN", "quantize.rtn"),
    four("int4 GPTQ", "quantize.gptq"),
    four("int4 AWQ", "quantize.awq"),
    Row("int4 GPTQ + EoRA", (EORA,), "int4 GPTQ"),
    Row("int4 GPTQ + int8 head", (
        ("quantize.gptq", {"bits": 4, "block": 32, "targets": BODY}), HEAD_IN_8)),
    Row("2:4", (("prune.sparsegpt", {"pattern": "2:4", "targets": BODY}),)),
    Row("2:4 + EoRA", (EORA,), "2:4"),
    vptq(3, vector_length=4, centroids=256, residual_centroids=16),
    vptq(2, vector_length=4, centroids=256),
    Row("cache int8", (("quantize.kv_cache", {"bits": 8}),)),
    Row("int4 RTN + cache int8", (("quantize.kv_cache", {"bits": 8}),), "int4 RTN"),
    pv("3 bits VPTQ"),
    pv("2 bits VPTQ"),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The model, its texts, and where rows are kept."""

    original: gw.Program
    calibration: Batches
    training: Batches
    held_out: Batches
    texts: Sequence[Sequence[int]]
    out: Path

    def made(self, row: Row, rows: dict[str, Row]) -> gw.Program:
        """The row's program: from its file, or else made of that of the row it starts from."""
        kept = self.out / f"{_slug(row.name)}.pt2"
        if kept.exists():
            program = gw.load(kept)
            assert isinstance(program, gw.Program)
            return program
        program = self.made(rows[row.start], rows) if row.start else self.original
        context = Context(
            calibration=self.calibration, training=self.training, teacher=self.original
        )
        for index, (id, options) in enumerate(row.steps):
            step = find_pass(id)(**options)
            program = step.execute(program, context.within(row.name, index)).program
        program.save(kept)
        return program


def bench(folder: Path, out: Path) -> Bench:
    """The model of a folder traced, and its texts."""
    original = build_program(load_model(folder, section=ModelSection()), ModelSection(), 0)
    learn, test = prose.written(out / "text")

    def text(path: Path, **section: Any) -> Batches:
        shared = {"data": str(path), "tokenizer": str(folder)}
        return load_data({**shared, **section}, original.signature, 0)

    return Bench(
        original=original,
        calibration=text(learn, window=WINDOW, samples=32, batch_size=2),
        training=text(learn, window=WINDOW // 2, samples=80, batch_size=2),
        held_out=text(test, window=WINDOW, samples=16, batch_size=2, metric="perplexity"),
        texts=written_by_transformers(folder, test),
        out=out,
    )


def written_by_transformers(folder: Path, file: Path) -> Sequence[Sequence[int]]:
    """Token ids of 20 prompts of `PROMPT` tokens, each with what transformers writes behind it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [tokenizer(line)["input_ids"] for line in file.read_text(encoding="utf-8").splitlines()]
    long = [line[:PROMPT] for line in lines if len(line) > PROMPT]
    prompts = torch.tensor(long[:: len(long) // PROMPTS][:PROMPTS])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=STEPS,
        pad_token_id=PADDING,
    )  # fmt: skip
    return [[token for token in row.tolist() if token != PADDING] for row in found]


def measured(bench: Bench, row: Row, rows: dict[str, Row]) -> tuple[str, ...]:
    """Cells of the row."""
    start = time.perf_counter()
    program = bench.made(row, rows)
    seconds = time.perf_counter() - start
    compiled = gw.lower(program, "onnxruntime", logits="all")
    size = compiled.save(bench.out / _slug(row.name)).file_bytes
    perplexity, agreement = figures(bench, compiled, scorer_of(compiled))
    cells = f"{perplexity:.3f}", f"{agreement:.1%}", f"{size / 1e6:.1f}", f"{seconds:.0f}"
    return (row.name, *cells)


def figures(bench: Bench, compiled: Any, scorer: Scorer) -> tuple[float, float]:
    """Perplexity of the held-out text, and share of greedy steps that are the original's."""
    total, tokens = 0.0, 0
    for inputs, labels in bench.held_out.labelled():
        assert labels is not None
        total -= float(scorer(inputs, labels).log_likelihoods.sum())
        tokens += int((labels[:, 1:] != IGNORED_LABEL).sum())
    equal, steps = 0, 0
    for start in range(0, len(bench.texts), 4):
        ids, lengths = padded(bench.texts[start : start + 4])
        places = torch.arange(ids.shape[1])
        is_new = (places >= PROMPT) & (places < lengths[:, None])
        labels = ids.where(is_new, torch.tensor(IGNORED_LABEL))
        found = scorer(text_inputs(compiled.signature, ids, lengths), labels)
        equal, steps = equal + int(found.is_greedy.sum()), steps + int(is_new.sum())
    return math.exp(total / tokens), equal / steps


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def main() -> None:
    """Makes and measures every row, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="names of rows, comma separated")
    parser.add_argument("--out", type=Path, default=_paths.ROOT / "out" / "bench-llm")
    parser.add_argument("--model", type=Path, help="another folder of transformers than SmolLM2's")
    options = parser.parse_args()
    rows = {row.name: row for row in ROWS}
    one = bench(options.model or smollm2.folder(), options.out)
    print(
        "| | perplexity | agreement | file MB | seconds to make |\n"
        "| --- | ---: | ---: | ---: | ---: |"
    )
    for name in options.only.split(",") if options.only else rows:
        print("| " + " | ".join(measured(one, rows[name], rows)) + " |", flush=True)


if __name__ == "__main__":
    main()
