"""Inputs on which a decoder with a cache is compared: prompts, steps, and both.

Masks are full here, and rows as long as each other: there the program and a kernel that keeps rows
compact compute the same, output by output. Ragged batches are compared by `ragged.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch

from graphwright.backends.onnxruntime.check import Case
from graphwright.backends.onnxruntime.drawn import root_mean_square
from graphwright.ir.check.fidelity import compare
from graphwright.ir.check.together import run_together
from graphwright.ir.data.far import far_inputs
from graphwright.ir.data.synthetic import example_sizes
from graphwright.ir.generation.record import Generation
from graphwright.ir.program import Program

Flat = tuple[torch.Tensor, ...]

SIZES = (
    (1, 3, 5), (2, 1, 5), (1, 1, 4), (3, 4, 0), (1, 5, 2), (2, 1, 0), (1, 1, 0), (2, 1, 1),
)  # fmt: skip
"""Batch, tokens and past: several tokens on a past only in a batch of one, which is what kernels
take."""


@torch.no_grad()
def cached_cases(program: Program, record: Generation) -> list[Case]:
    """What the program gives at every one of the sizes, just beyond its sliding window, and on
    pasts far from these."""
    sizes = [*SIZES]
    window, most = record.sliding_window, record.context_length
    if window and (most is None or window + 3 <= most):
        sizes += [(1, 2, window + 1), (1, window + 2, 0)]
    near = [cached_inputs(program, record, *size) for size in sizes]
    far = far_inputs(program.replace(examples=near[0]))
    inputs = [*near, *far.values()]
    outputs = run_together(program, inputs)
    usual = tuple(root_mean_square(out) for out in outputs[0])
    exact = cache(partial(run_together, program, inputs, wide=True))
    cases = []
    for place, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
        case = Case(
            given, expected, example_sizes(program.signature, given), partial(_of, exact, place)
        )
        cases.append(case)
    losses = cache(partial(_losses, outputs[: len(near)], exact))
    for place in range(len(near)):
        cases[place] = replace(cases[place], losses=losses)
    for place, drawn in enumerate(far, len(near)):
        cases[place] = replace(cases[place], drawn=drawn, usual=usual)
    return [c for c in cases if not c.drawn or all(bool(t.isfinite().all()) for t in c.expected)]


def _of(
    exact: Callable[[], list[tuple[torch.Tensor, ...]]], place: int
) -> tuple[torch.Tensor, ...]:
    return exact()[place]


def _losses(outputs: list[Flat], exact: Callable[[], list[Flat]]) -> tuple[float, ...]:
    """The largest relative error of every output over some runs, against float64."""
    errors = [
        [compare(wide, own).relative for wide, own in zip(references, run, strict=True)]
        for references, run in zip(exact()[: len(outputs)], outputs, strict=True)
    ]
    return tuple(map(max, zip(*errors, strict=True)))


def cached_inputs(program: Program, record: Generation, batch: int, tokens: int, past: int) -> Flat:
    """Random tokens on a random past, none of it padding."""
    generator = torch.Generator().manual_seed(1000 * past + 10 * tokens + batch)
    others = example_sizes(program.signature, program.examples)
    sizes = {**others, "batch": batch, "seq": tokens, "past": past}
    sizes = program.signature.completed(sizes)
    made = []
    for spec in program.signature.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if spec.name == record.ids:
            low, high = (int(v) for v in spec.range or (0, record.vocab_size))
            made.append(torch.randint(low, high, shape, generator=generator))
        elif dtype == torch.int64 and spec.name.endswith("mask"):
            made.append(torch.ones(shape, dtype=dtype))
        elif spec.name == record.positions:
            made.append(torch.arange(past, past + tokens).expand(batch, -1).clone())
        else:
            made.append(torch.randn(shape, generator=generator).to(dtype))
    return tuple(made)
