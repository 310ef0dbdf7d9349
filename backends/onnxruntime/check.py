"""Is the ONNX model the program? Checked by numbers at two sizes of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphwright.ir.check.fidelity import compare
from graphwright.ir.data.synthetic import example_sizes, other_size_inputs
from graphwright.ir.program import Program

HALF = {"float16": 2**-10, "bfloat16": 2**-7}


class Differs(Exception):
    """A model that does not compute what the program computes (or does not run at all)."""


@dataclass(frozen=True)
class Case:
    """Inputs, the program's own outputs for them, and the sizes of the dynamic dimensions."""

    inputs: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]
    sizes: dict[str, int]


def check_cases(program: Program) -> list[Case]:
    """The example inputs, and inputs at another size of every dimension, where it has one."""
    other = other_size_inputs(program, seed=0)
    cases = [program.examples] if other is None else [program.examples, other]
    with torch.no_grad():
        return [
            Case(inputs, program.run_flat(inputs), example_sizes(program.signature, inputs))
            for inputs in cases
        ]


def tolerance_for(program: Program, tolerance: float) -> float:
    """The bound for a program: float32's, or as much coarser as its coarsest float type is."""
    names = {str(t.dtype).removeprefix("torch.") for t in program.state.values()}
    names |= {spec.dtype for spec in program.signature.outputs}
    return tolerance * max([HALF.get(name, 2**-23) for name in names] or [2**-23]) / 2**-23


def compare_outputs(
    program: Program, case: Case, actual: Sequence[torch.Tensor], bound: float
) -> float:
    """Largest relative error over the outputs.

    Raises:
        Differs: names the first output that is off, with its error.
    """
    worst = 0.0
    for spec, a, b in zip(program.signature.outputs, case.expected, actual, strict=True):
        where = f"output {spec.name!r} at {case.sizes or 'the example sizes'}"
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Differs(
                f"{where} is {tuple(b.shape)} {b.dtype}, the program's {tuple(a.shape)} {a.dtype}"
            )
        error = compare(a, b)
        if error.broken or not error.relative <= bound:
            raise Differs(
                f"{where} differs: relative error {error.relative:.3g}, allowed {bound:.3g}"
            )
        worst = max(worst, error.relative)
    return worst
