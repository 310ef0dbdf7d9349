"""The smallest sizes of free dimensions, at which a traced shape may not hold.

Tracing takes every free size to be 2 or more, and shapes are simplified with that: `min(n, 2)` is
2. PyTorch looks at the real sizes when it runs and is right at 1 all the same; an ONNX model that
was written from those shapes may not be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from graphwright.backends.onnxruntime.check import Case, Differs, case_of
from graphwright.ir.data.synthetic import example_sizes, resized
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange

Judge = Callable[[Case], float]


def too_small(program: Program, judge: Judge) -> dict[str, str]:
    """Dimensions at whose size 1 the model is wrong, and what happens there.

    Args:
        program: what the model was made from.
        judge: runs the model on the inputs of a case; raises where it fails or differs.
    """
    found = {}
    sizes = example_sizes(program.signature, program.examples)
    for dim, size in sizes.items():
        least = program.signature.dims.get(dim, DimRange()).min
        if dim in program.signature.derived or least > 1 or size == 1:
            continue
        smaller = program.signature.completed({**sizes, dim: least})
        inputs = tuple(
            resized(tensor, spec, smaller)
            for tensor, spec in zip(program.examples, program.signature.inputs, strict=True)
        )
        try:
            case = case_of(program, inputs)
        except (RuntimeError, IndexError, ValueError):
            continue  # the program does not run there either
        try:
            judge(case)
        except Differs as error:
            found[dim] = str(error)
        except Exception as error:
            found[dim] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return found


def from_two(program: Program, dims: dict[str, str]) -> Program:
    """The program with the dimensions at 2 or more."""
    signature = program.signature
    ranges = {
        **signature.dims,
        **{name: replace(signature.dims.get(name, DimRange()), min=2) for name in dims},
    }
    return program.replace(signature=replace(signature, dims=ranges))
