"""Inputs that drive activations far to either side, beside the examples.

Some faults show on one sign only: a pad by zeros that became one by minus infinity changes nothing
in front of a pooling whose inputs are positive. Around zero, examples seldom get there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from graphwright.backends.onnxruntime.check import Case, case_of
from graphwright.ir.program import Program

SPREAD, SHIFT = 0.3, 2.0
"""A drawn input is SPREAD times the example, moved by SHIFT times its root mean square."""


def drawn_cases(program: Program) -> list[Case]:
    """The float inputs moved up, and down; fewer where the program gives no finite outputs there.

    Integers and booleans stay as they are: they may be places in a table. A program without float
    inputs has no such case.
    """
    if not any(tensor.is_floating_point() for tensor in program.examples):
        return []
    found = []
    for sign, drawn in ((1.0, "moved up"), (-1.0, "moved down")):
        inputs = tuple(_moved(tensor, sign) for tensor in program.examples)
        try:
            case = case_of(program, inputs)
        except (RuntimeError, IndexError, ValueError):
            continue
        if all(bool(torch.isfinite(tensor).all()) for tensor in case.expected):
            found.append(replace(case, drawn=drawn))
    return found


def _moved(tensor: torch.Tensor, sign: float) -> torch.Tensor:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    size = float(torch.nan_to_num(tensor.float(), 0.0, 0.0, 0.0).square().mean().sqrt())
    return (sign * (SPREAD * tensor.float() + SHIFT * size)).to(tensor.dtype)
