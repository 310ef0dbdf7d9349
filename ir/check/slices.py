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

    A slice whose error is no more than float64 rounds in the whole tensor counts as equal.

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
    a, b = _real(a), _real(b).to(a.device)
    finite = a.isfinite() & b.isfinite()
    error = torch.where(finite, a - b, 0.0).square()
    energy = torch.where(finite, a, 0.0).square()
    floor = float(energy.sum()) * 2.0**-100
    found = [torch.zeros(0, dtype=torch.float64, device=a.device)]
    for axis in range(a.dim()):
        if a.numel() // a.shape[axis] < least:
            continue
        others = [other for other in range(a.dim()) if other != axis]
        off, size = (x.sum(others) if others else x for x in (error, energy))
        found.append(torch.where(off <= floor, 0.0, (off / size).sqrt()))
    return torch.cat(found).cpu()


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()
