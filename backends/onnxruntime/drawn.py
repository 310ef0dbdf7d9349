"""The program's own outputs on inputs far from the examples."""

from __future__ import annotations

from dataclasses import replace

import torch

from graphwright.backends.onnxruntime.check import Case, case_of
from graphwright.ir.data.far import far_inputs
from graphwright.ir.program import Program


def drawn_cases(program: Program) -> list[Case]:
    """A case for each of the far inputs at which the program gives finite outputs."""
    found = []
    usual = tuple(root_mean_square(out) for out in case_of(program, program.examples).expected)
    for drawn, inputs in far_inputs(program).items():
        try:
            case = case_of(program, inputs)
        except (RuntimeError, IndexError, ValueError):
            continue
        if all(bool(torch.isfinite(tensor).all()) for tensor in case.expected):
            found.append(replace(case, drawn=drawn, usual=usual))
    return found


def root_mean_square(tensor: torch.Tensor) -> float:
    """Of the finite values; 0 where there are none."""
    values = tensor.double()[tensor.isfinite()]
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
