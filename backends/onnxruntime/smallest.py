"""The smallest sizes of free dimensions, at which a traced shape may not hold.

Tracing takes every free size to be 2 or more, and shapes are simplified with that: `min(n, 2)` is
2. PyTorch looks at the real sizes when it runs and is right at 1 all the same; an ONNX model that
was written from those shapes may not be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from graphwright.backends.onnxruntime.check import Differs, case_of, compare_outputs
from graphwright.ir.data.synthetic import example_sizes, resized
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange

Run = Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]


def too_small(program: Program, run: Run, bound: float) -> dict[str, str]:
    """Dimensions at whose size 1 the model is wrong, and what happens there.

    Args:
        program: what the model was made from.
        run: the model, on one tensor per input.
        bound: as for `compare_outputs`.
    """
    found = {}
    sizes = example_sizes(program.signature, program.examples)
    for dim, size in sizes.items():
        if program.signature.dims.get(dim, DimRange()).min > 1 or size == 1:
            continue
        smaller = {**sizes, dim: 1}
        inputs = tuple(
            resized(tensor, spec, smaller)
            for tensor, spec in zip(program.examples, program.signature.inputs, strict=True)
        )
        try:
            case = case_of(program, inputs)
        except (RuntimeError, IndexError, ValueError):
            continue  # the program does not run there either
        try:
            compare_outputs(program, case, run(inputs), bound)
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
