"""Inputs far from the examples: other signs, large values, single spikes.

Some faults show there only. A pad by zeros that became one by minus infinity changes nothing in
front of a pooling whose inputs are positive, and a value cut off at four standard deviations is
seldom met around zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphwright.ir.program import Program

SPREAD, SHIFT = 0.3, 2.0
"""A moved input is SPREAD times the example, moved by SHIFT times its root mean square."""

WIDE = 6.0
"""Factor of the samples of a widened input, up or down in turn; SPIKE of its single spikes."""
SPIKE = 40.0


def far_inputs(program: Program) -> dict[str, tuple[Tensor, ...]]:
    """The example inputs moved up, moved down and widened, by those words.

    Integers and booleans stay as they are: they may be places in a table. Empty where there are no
    other inputs.
    """
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "moved up": lambda t: _moved(t, 1.0),
        "moved down": lambda t: _moved(t, -1.0),
        "widened": _widened,
    }
    free = [t.is_floating_point() and t.numel() > 0 for t in program.examples]
    if not any(free):
        return {}
    return {
        name: tuple(
            move(tensor) if may else tensor
            for tensor, may in zip(program.examples, free, strict=True)
        )
        for name, move in moves.items()
    }


def _size(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.float(), 0.0, 0.0, 0.0).square().mean().sqrt()


def _moved(tensor: Tensor, sign: float) -> Tensor:
    return (sign * (SPREAD * tensor.float() + SHIFT * _size(tensor))).to(tensor.dtype)


def _widened(tensor: Tensor) -> Tensor:
    """Samples WIDE times as large and as small in turn, with a spike of either sign in each."""
    rows = tensor.float().reshape(tensor.shape[0] if tensor.dim() else 1, -1).clone()
    count, width = rows.shape
    up = torch.arange(count, device=rows.device) % 2 == 0
    rows *= torch.where(up, WIDE, 1 / WIDE)[:, None]
    places = torch.arange(count, device=rows.device)
    spike = SPIKE * _size(tensor)
    rows[places, (7 * places) % width] = spike
    rows[places, (7 * places + width // 2) % width] = -spike
    return rows.reshape(tensor.shape).to(tensor.dtype)
