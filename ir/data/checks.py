"""Checks of a batch against a signature, before a run is an hour old."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature, TensorSpec

RawBatch = Mapping[str, Tensor]
LABEL_NAMES = ("labels", "targets")


def check_batch(raw: RawBatch, signature: Signature, where: str) -> dict[str, Tensor]:
    """`raw`'s inputs in signature order, in the signature's dtypes.

    Raises:
        ArgumentError: a missing input, a wrong rank or size, a NaN, or a dtype that would lose
            values when cast.
    """
    check_names(list(raw), signature, where)
    sizes: dict[str, int] = {}
    return {
        spec.name: _check_input(spec, raw[spec.name], signature.dims, sizes, where)
        for spec in signature.inputs
    }


def without_padding(
    batch: dict[str, Tensor], labels: Tensor | None, signature: Signature
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The batch cut to its longest text, where a mask says that the rest is padding in every row.

    A file holds texts of all lengths in one array; run as it stands, most of what a calibration
    would see are padding tokens. Only a dynamic length is cut, and only behind the last token.
    """
    for spec in signature.inputs:
        is_mask = spec.name.endswith("mask") and len(spec.shape) == 2
        if not is_mask or not isinstance(spec.shape[1], str):
            continue
        mask, dim = batch[spec.name] != 0, spec.shape[1]
        kept = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 0
        if kept < 2 or kept == mask.shape[1]:
            continue
        cut = dict(batch)
        for other in signature.inputs:
            for axis, name in enumerate(other.shape):
                if name == dim:
                    cut[other.name] = cut[other.name].narrow(axis, 0, kept)
        same = labels is not None and labels.shape[:2] == mask.shape
        return cut, labels[:, :kept] if same and labels is not None else labels
    return batch, labels


def check_names(given: Sequence[str], signature: Signature, where: str) -> None:
    """Raises ArgumentError when an input is not among the names, with the nearest of them."""
    for spec in signature.inputs:
        if spec.name not in given:
            near = difflib.get_close_matches(spec.name, given, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"there is nothing for input {spec.name!r}{hint}",
                where=where,
                fix=f"It holds {sorted(given)}; the model takes "
                f"{[s.name for s in signature.inputs]}.",
            )


def _check_input(
    spec: TensorSpec,
    value: Tensor,
    dims: Mapping[str, DimRange],
    sizes: dict[str, int],
    where: str,
) -> Tensor:
    where = f"{where}: input {spec.name!r}"
    shape, wanted = tuple(value.shape), _shape_text(spec)
    if len(shape) != len(spec.shape):
        raise ArgumentError(f"has rank {len(shape)} {shape}; the model takes {wanted}", where=where)
    for dim, size in zip(spec.shape, shape, strict=True):
        if isinstance(dim, int):
            if dim != size:
                raise ArgumentError(f"has shape {shape}; the model takes {wanted}", where=where)
            continue
        bounds = dims.get(dim, DimRange())
        if size < bounds.min or (bounds.max is not None and size > bounds.max):
            most = "" if bounds.max is None else f" to {bounds.max}"
            raise ArgumentError(
                f"dimension {dim!r} is {size}; the model takes {bounds.min}{most}", where=where
            )
        if sizes.setdefault(dim, size) != size:
            raise ArgumentError(
                f"dimension {dim!r} is {size} here and {sizes[dim]} in another input", where=where
            )
    return _cast(value, getattr(torch, spec.dtype), where)


def _cast(value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    if value.is_floating_point() and not bool(value.isfinite().all()):
        row = int(
            (~value.isfinite())
            .reshape(value.shape[0] if value.dim() else 1, -1)
            .any(1)
            .int()
            .argmax()
        )
        raise ArgumentError(f"row {row} holds NaN or infinity", where=where)
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    # Comparing in the given dtype is exact both ways: a cast that loses anything does not return.
    if not torch.equal(cast.to(value.dtype), value):
        given, wanted = (str(d).removeprefix("torch.") for d in (value.dtype, dtype))
        raise ArgumentError(
            f"is {given}, and {wanted} cannot hold its values exactly",
            where=where,
            fix=f"Store it as {wanted}.",
        )
    return cast


def _shape_text(spec: TensorSpec) -> str:
    return f"rank {len(spec.shape)} ({', '.join(map(str, spec.shape))})"


def named_batch(item: Any, signature: Signature, where: str) -> dict[str, Tensor]:
    """A batch by input name, of a mapping or a tuple in input order.

    Raises:
        ArgumentError: it is another number of tensors, or holds what is none.
    """
    if isinstance(item, Tensor) or not isinstance(item, (Mapping, tuple, list)):
        item = (item,)
    if not isinstance(item, Mapping):
        names = [spec.name for spec in signature.inputs]
        # one value more than there are inputs: the usual (inputs..., labels)
        names += [LABEL_NAMES[0]] if len(item) == len(names) + 1 else []
        if len(item) != len(names):
            raise ArgumentError(
                f"is a tuple of {len(item)}; the model takes {len(names)} inputs {names}",
                where=where,
            )
        item = dict(zip(names, item, strict=True))
    try:
        return {str(name): torch.as_tensor(value) for name, value in item.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"holds something that is no tensor: {error}", where=where) from error
