"""What every way to quantize and compensate costs in fidelity, on real weights and real text.

    python tests/benchmarks/low_bits.py encoder [--only NAME,...]
    python tests/benchmarks/low_bits.py gpt [--only NAME,...]

`encoder`: the pretrained sentence encoder; 128 calibration sentences, 320 held-out ones. Mean
cosine of the embeddings with those of the original, and the share of sentences whose nearest other
sentence stays the same. `gpt`: the small GPT trained on Python's library; perplexity per byte of
held-out text. Size is that of all stored tensors, embeddings included, as a share of float32;
with 2 and 3 bits embeddings stay in float, since VPTQ has no form for them.
A row whose name has an arrow starts from the row before the arrow. "3e-2" is the `code_lr` of
`quantize.pv`, in the place of its 1e-2; "cosine" a schedule in the place of the constant rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
from models import encoder, gpt

from graphwright.ir.context import Context
from graphwright.ir.program import Program
from graphwright.passes.registry import find_pass


@dataclass(frozen=True)
class Row:
    """A named chain of passes, each an id and its options; `start` is a row it goes on from."""

    name: str
    passes: tuple[tuple[str, dict[str, Any]], ...]
    start: str = ""


def one(name: str, id: str, start: str = "", **options: Any) -> Row:
    return Row(name, ((id, options),), start)


PV_WAYS: dict[str, dict[str, Any]] = {"straight-through": {"max_change": 1.0}, "PV": {}}


def pv(start: str, loss: str, steps: int) -> list[Row]:
    """PV-Tuning, its P step alone, and straight-through training, for the same steps: at the
    paper's constant rates, and with codes three times as fast; there under a cosine schedule too.
    """
    tune = {"loss": loss, "steps": steps}

    def row(name: str, how: dict[str, Any], **options: Any) -> Row:
        return one(f"{start} -> {name}", "quantize.pv", start, tune=how, **options)

    rows = [row("P step only", tune, codes=False)]
    rows += [row(name, tune, **way) for name, way in PV_WAYS.items()]
    fast: dict[str, Any] = {"code_lr": 3e-2}
    rows += [row(f"{name} 3e-2", tune, **fast, **way) for name, way in PV_WAYS.items()]
    decaying = {**tune, "schedule": "cosine"}
    rows += [row(f"{name} 3e-2 cosine", decaying, **fast, **way) for name, way in PV_WAYS.items()]
    return rows


def low_rank(start: str, ranks: Sequence[int]) -> list[Row]:
    return [
        one(f"{start} -> {name} {rank}", f"compensate.{id}", start, rank=rank)
        for rank in ranks
        for name, id in (("SVD", "svd"), ("EoRA", "eora"))
    ]


def four_bits(block: int) -> list[Row]:
    return [
        one(f"int4 g{block} RTN", "quantize.rtn", bits=4, block=block),
        one(f"int4 g{block} GPTQ", "quantize.gptq", bits=4, block=block),
        one(f"int4 g{block} AWQ", "quantize.awq", bits=4, block=block),
        one(f"int4 g{block} AdaQuant", "quantize.adaquant", bits=4, block=block, iterations=300),
    ]


def few_bits(bits: int) -> list[Row]:
    """Tables stay in float here, as in VPTQ, which has none for them."""
    options: dict[str, Any] = {"bits": bits, "embeddings": False}
    return [
        one(f"{bits} bits g{block} {name}", f"quantize.{name.lower()}", block=block, **options)
        for block in (128, 32)
        for name in ("RTN", "GPTQ")
    ]


SMOOTH = ("quantize.smoothquant", {})

ENCODER = [
    Row("int8 dynamic", (SMOOTH, ("quantize.int8", {"activations": "dynamic"}))),
    Row("int8 static", (SMOOTH, ("quantize.int8", {"activations": "static"}))),
    *four_bits(32),
    *low_rank("int4 g32 GPTQ", (8, 32)),
    *four_bits(128),
    *low_rank("int4 g128 GPTQ", (8, 32)),
    one("NF4", "quantize.nf4"),
    one("NF4, float scales", "quantize.nf4", double_quantization=False),
    *few_bits(3),
    one("3 bits VPTQ", "quantize.vptq", vector_length=4, centroids=256, residual_centroids=16),
    *few_bits(2),
    one("2 bits VPTQ", "quantize.vptq", vector_length=4, centroids=256),
    *low_rank("2 bits VPTQ", (32,)),
    *low_rank("2 bits g32 GPTQ", (32,)),
    *pv("2 bits g32 GPTQ", "teacher_mse", 40)[:3],
]

SPARSE = "2:4 SparseGPT"

GPT = [
    Row("int8 dynamic", (("quantize.int8", {"activations": "dynamic"}),)),
    *four_bits(32),
    *four_bits(128),
    one("NF4", "quantize.nf4"),
    *few_bits(3),
    one("3 bits VPTQ", "quantize.vptq", vector_length=4, centroids=256, residual_centroids=16),
    *low_rank("3 bits g32 GPTQ", (8, 32)),
    *few_bits(2),
    one("2 bits VPTQ", "quantize.vptq", vector_length=4, centroids=256),
    *low_rank("2 bits g32 GPTQ", (8, 32)),
    *pv("2 bits g32 GPTQ", "kl", 80),
    *pv("2 bits VPTQ", "kl", 80)[:3],
    one(SPARSE, "prune.sparsegpt", pattern="2:4", targets=["blocks.*"]),
    *low_rank(SPARSE, (8, 32)),
    one("2:4 + int4 g128", "quantize.gptq", SPARSE, bits=4, block=128, keep_zeros=True),
    *low_rank("2:4 + int4 g128", (8, 32)),
]


@dataclass
class Subject:
    """A model with its data and its measure."""

    program: Program
    calibration: Sequence[Any]
    training: Sequence[Any]
    measure: Callable[[Program], tuple[str, ...]]
    columns: tuple[str, ...]
    rows: list[Row]


def encoder_subject() -> Subject:
    program, held_out = encoder.program(), encoder.held_out()
    reference = encoder.embeddings(program, held_out)

    def measure(other: Program) -> tuple[str, ...]:
        found = encoder.embeddings(other, held_out)
        cosine = encoder.mean_cosine(reference, found)
        return f"{cosine:.4f}", f"{encoder.retrieval(reference, found):.1%}"

    data = encoder.calibration()
    return Subject(program, data, data, measure, ("mean cosine", "nearest kept"), ENCODER)


def gpt_subject() -> Subject:
    program = gpt.program()
    return Subject(
        program, gpt.calibration(128), gpt.calibration(2048),
        lambda other: (f"{gpt.perplexity(other):.4f}",), ("perplexity",), GPT,
    )  # fmt: skip


def stored_bytes(program: Program) -> int:
    """Bytes of all tensors, a shared one once."""
    return sum({id(t): t.nbytes for t in program.state.values()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=["encoder", "gpt"])
    parser.add_argument("--only", default="", help="names of rows, comma separated")
    options = parser.parse_args()
    subject = encoder_subject() if options.subject == "encoder" else gpt_subject()
    rows = {row.name: row for row in subject.rows}
    wanted = [n for n in rows if not options.only or n in options.only.split(",")]
    whole = stored_bytes(subject.program)
    context = Context(
        calibration=subject.calibration, training=subject.training, teacher=subject.program
    )

    @cache
    def result(name: str) -> Program:
        row = rows[name]
        program = result(row.start) if row.start else subject.program
        for index, (id, given) in enumerate(row.passes):
            step = find_pass(id)(**given)
            program = step.execute(program, context.within(name, index)).program
        return program

    heads = ("", *subject.columns, "size", "seconds")
    print("| " + " | ".join(heads) + " |")
    print("| --- |" + " ---: |" * (len(heads) - 1))
    print(f"| float32 | {' | '.join(subject.measure(subject.program))} | 100.0% | |", flush=True)
    for name in wanted:
        start = time.perf_counter()
        if rows[name].start:
            result(rows[name].start)
            start = time.perf_counter()
        program = result(name)
        seconds = time.perf_counter() - start
        size = stored_bytes(program) / whole
        cells = (name, *subject.measure(program), f"{size:.1%}", f"{seconds:.0f}")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
