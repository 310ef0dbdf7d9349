"""Errors slice by slice: what a small part of a tensor loses beside a large one.

One relative error for a whole tensor does not see that eight channels of it are zero, where the
others are a million times as large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.ir.check.fidelity import leaves

LEAST = 4
"""Values of a slice that is judged by what rounding loses in it; fewer may be near by chance."""

FAR = 64.0
"""Multiple of a slice's own loss that counts as rounding: more than for a whole tensor, for the
worst of many slices is looked at."""


def slice_errors(reference: Any, candidate: Any, least: int = 1) -> Tensor:
    """Relative errors ||a - b|| / ||a|| of all slices along every axis of every tensor.

    A slice whose error is no more than float64 rounds in the whole tensor counts as equal; so does
    one of zeros in the reference whose error is no more than the tensors' own type rounds there: a
    sum that cancels is zero in one order and not in another.

    Args:
        reference: a tensor or a nest of tensors.
        candidate: the same nest; tensors of another shape are left out.
        least: values of a slice that is looked at.

    Returns:
        float64, one value per index of each axis; 0 where both are zero, inf where only the
        reference is; positions that are not finite on either side are left out.
    """
    pairs = zip(leaves(reference), leaves(candidate), strict=True)
    found = [_of_tensor(a, b, least) for (_, a), (_, b) in pairs if a.shape == b.shape]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def is_astray(exact: Any, own: Any, actual: Any, floor: float) -> bool:
    """Whether a slice of `actual` is off by more than rounding explains.

    Args:
        exact: values in float64. own: the same in a program's own precision, which shows what is
            lost by rounding. actual: what is judged; nests alike.
        floor: relative error that a slice may have in any case.
    """
    errors, losses = (slice_errors(exact, values, LEAST) for values in (actual, own))
    return bool((errors > torch.clamp(FAR * losses, min=floor)).any())


def _of_tensor(a: Tensor, b: Tensor, least: int) -> Tensor:
    if a.dim() == 0 or not a.numel():
        return torch.zeros(0, dtype=torch.float64)
    rounding = max(_rounding(a), _rounding(b))
    a, b = _real(a), _real(b).to(a.device)
    finite = a.isfinite() & b.isfinite()
    error = torch.where(finite, a - b, 0.0).square()
    energy = torch.where(finite, a, 0.0).square()
    total = float(energy.sum())
    floor, floor_of_zeros = total * 2.0**-100, total * rounding**2
    found = [torch.zeros(0, dtype=torch.float64, device=a.device)]
    for axis in range(a.dim()):
        if a.numel() // a.shape[axis] < least:
            continue
        others = [other for other in range(a.dim()) if other != axis]
        off, size = (x.sum(others) if others else x for x in (error, energy))
        equal = (off <= floor) | ((size == 0) & (off <= floor_of_zeros))
        found.append(torch.where(equal, 0.0, (off / size).sqrt()))
    return torch.cat(found).cpu()


def _rounding(tensor: Tensor) -> float:
    """What sums of float32 or less lose in the whole of a tensor; nothing for other types."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return 4 * 2.0**-23 if inexact and tensor.dtype not in (torch.float64, torch.complex128) else 0


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()
