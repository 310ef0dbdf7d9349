"""The inputs of a generator that are drawn, and the samples that it makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_output

STEP_PER_BATCH = Rule("tune", "tune['accumulate'] == 1",
    "the discriminator takes a step per batch: leave accumulate at 1")  # fmt: skip


def latents_of(program: Program, names: Sequence[str] | None, by: str) -> tuple[str, ...]:
    """Names of the inputs that are drawn.

    Args:
        program: the generator.
        names: as in the options; when None, its one input.
        by: id of the pass, for messages.

    Raises:
        ArgumentError: there are several inputs and none is named, or one of a name is not there.
        ModelError: a latent is not of floating point.
    """
    inputs = {spec.name: spec for spec in program.signature.inputs}
    if names is None and len(inputs) > 1:
        raise ArgumentError(f"{by}: the generator has the inputs {', '.join(inputs)}",
                            fix="Say in `latents` which of them are drawn.")  # fmt: skip
    chosen = tuple(inputs) if names is None else tuple(names)
    for name in chosen:
        if name not in inputs:
            raise ArgumentError(f"{by}: the generator has no input {name!r}",
                                fix=f"Its inputs are {', '.join(inputs)}.")  # fmt: skip
        if not getattr(torch, inputs[name].dtype).is_floating_point:
            raise ModelError(f"{by} draws latents of floating point, and {name!r} is "
                             f"{inputs[name].dtype}")  # fmt: skip
    return chosen


def drawn(batch: Values, latents: Sequence[str]) -> dict[str, Tensor]:
    """The batch with new latents, standard normal, from torch's generator."""
    return {**batch, **{name: torch.randn_like(batch[name]) for name in latents}}


def shape_made(program: Program, by: str) -> tuple[int, ...]:
    """Shape of one sample that a generator makes.

    Raises:
        ModelError: its output is not (batch, ...) with fixed sizes.
    """
    output = program.signature.outputs[main_output(program.signature)].shape
    sizes = tuple(size for size in output[1:] if isinstance(size, int))
    batch = program.signature.inputs[0].shape[:1]
    if not sizes or len(sizes) != len(output) - 1 or tuple(output[:1]) != tuple(batch):
        raise ModelError(f"{by} trains generators of one sample per row of the input, of a fixed "
                         f"size, and the output is {list(output)}")  # fmt: skip
    return sizes
