"""Values of inputs that a call leaves out: an empty past, a mask of ones, positions from the mask.

The one place for it: programs, artifacts, and data that has texts alone come here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.signature import Signature, TensorSpec

MASK = "attention_mask"


def with_defaults(signature: Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the inputs that have a rule in `signature.defaults` and were left out.

    - `zeros`: zeros, of the least size in dimensions that no given input has (a past of length 0);
    - `ones`: ones;
    - `positions`: int64 (batch, seq), the number of tokens of the row in front of each by the
      attention mask (batch, total), whose last columns are the new tokens.

    Inputs that cannot be made, because what they follow from is missing too, stay out.
    """
    absent = [spec for spec in signature.inputs if spec.name not in given]
    missing = [spec for spec in absent if spec.name in signature.defaults]
    if not missing:
        return dict(given)
    full = dict(given)
    sizes = _sizes(signature, given)
    rules = signature.defaults
    for spec in sorted(missing, key=lambda spec: rules[spec.name] == "positions"):
        if not all(isinstance(dim, int) or dim in sizes for dim in spec.shape):
            continue
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
        if rules[spec.name] == "positions":
            full[spec.name] = positions(full.get(MASK), shape).to(_device(given))
        else:
            make = torch.ones if rules[spec.name] == "ones" else torch.zeros
            full[spec.name] = make(shape, dtype=_dtype(spec), device=_device(given))
    return full


def positions(mask: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Position ids, int64 of `shape` (batch, seq), by a mask (batch, total); 0 at padding in
    front of the first token, as transformers has them."""
    if mask is None:
        return torch.arange(shape[1]).expand(*shape).clone()
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, counted.shape[1] - shape[1] :]


def started(signature: Signature, given: Collection[str] = (MASK,)) -> Signature:
    """The interface of a call that gives some inputs only: what data has to bring.

    Inputs with a rule are left out where they are not given. Dimensions are named anew where that
    leaves out the past: with one of 0, `total` is `seq`.

    Args:
        signature: of the program.
        given: inputs that the data has.
    """
    if not signature.defaults:
        return signature
    kept = [s for s in signature.inputs if s.name not in signature.defaults or s.name in given]
    known = {dim for spec in kept for dim in spec.shape if isinstance(dim, str)}
    same = {
        dim: only for dim, sum_of in signature.derived.items()
        if (only := _only_term(sum_of, known)) is not None
    }  # fmt: skip
    inputs = tuple(
        replace(spec, shape=tuple(same.get(str(dim), dim) for dim in spec.shape)) for spec in kept
    )
    used = {dim for spec in inputs for dim in spec.shape}
    dims = {name: bounds for name, bounds in signature.dims.items() if name in used}
    derived = {name: text for name, text in signature.derived.items() if name in used}
    defaults = {s.name: rule for s in kept if (rule := signature.defaults.get(s.name)) is not None}
    return replace(signature, inputs=inputs, dims=dims, derived=derived, defaults=defaults)


def _only_term(sum_of: str, known: set[str]) -> str | None:
    """The one dimension of a sum that is there, where the others are 0."""
    terms = [term.strip() for term in sum_of.split("+")]
    kept = [term for term in terms if term in known]
    return kept[0] if len(kept) == 1 and not any(term.isdecimal() for term in terms) else None


def _sizes(signature: Signature, given: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by the inputs that are there; others that may be 0 are 0."""
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        value = given.get(spec.name)
        if isinstance(value, Tensor) and value.dim() == len(spec.shape):
            for dim, size in zip(spec.shape, value.shape, strict=True):
                if isinstance(dim, str):
                    sizes.setdefault(dim, size)
    for dim, bounds in signature.dims.items():
        if dim not in signature.derived and bounds.min == 0:
            sizes.setdefault(dim, 0)
    return {**signature.completed(sizes), **sizes}


def _device(given: Mapping[str, Any]) -> torch.device:
    tensors = (value for value in given.values() if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dtype(spec: TensorSpec) -> torch.dtype:
    found: torch.dtype = getattr(torch, spec.dtype)
    return found
