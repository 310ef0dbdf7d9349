"""Which tokens of calibration data are padding, and activations without them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphwright.ir.layers.products import Geometry
from graphwright.ir.program import Program

MASK_INPUTS = ("attention_mask", "mask", "padding_mask")
"""Names of inputs (batch, sequence) that are 0 where a token is padding."""


def real_tokens(program: Program, batches: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
    """For every batch (batch, length) booleans, true where a token is no padding; None where the
    inputs do not tell.

    Args:
        program: whose inputs they are.
        batches: one tensor per input each.
    """
    for place, spec in enumerate(program.signature.inputs):
        if spec.name in MASK_INPUTS and len(spec.shape) == 2:
            tokens = _tokens(program, place)
            return [batch[place][:, -batch[tokens].shape[1] :] != 0 for batch in batches]
    return [None] * len(batches)


def _tokens(program: Program, mask: int) -> int:
    """Place of an input (batch, tokens) of a mask; behind a past, the mask is longer than that."""
    specs = program.signature.inputs
    sum_of = program.signature.derived.get(str(specs[mask].shape[1]))
    if sum_of is None:
        return mask
    found = (i for i, s in enumerate(specs) if len(s.shape) == 2 and s.shape[1] in sum_of.split())
    return next(found, mask)


def real_values(x: Tensor, real: Tensor | None) -> Tensor:
    """An activation's real tokens, (n, in); the activation itself where its rows are no tokens."""
    if real is None:
        return x
    if x.dim() >= 3 and x.shape[:2] == real.shape:
        return x[real]
    if x.dim() == 2 and x.shape[0] == real.numel():
        return x[real.flatten()]
    return x


def without_padding(geometry: Geometry, x: Tensor, real: Tensor | None) -> Tensor:
    """The same for the input of a layer; that of a convolution stays whole, with its windows."""
    return x if geometry.is_convolution else real_values(x, real)
