"""Tensors in files instead of in memory: the system writes them out and drops them as it needs.

The files are in the folder for temporary files (`TMPDIR`), and unlinked as soon as they are
mapped: they take room on the disk while a tensor lives, and a killed process leaves none.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from graphwright.ir.program import Program

IN_MEMORY = 256 << 20
"""Bytes of tensors beside those of the model's own files that are kept in memory."""

SMALL = 1 << 16
"""Bytes of a tensor that is not worth a file."""


def mapped_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a dense tensor on the CPU, in a file of its own that is mapped.

    Args:
        tensor: is read once, in its own order.
        dtype: of the copy; the tensor's own when None. There is no further copy on the way.

    Raises:
        OSError: the disk has no room for it.
    """
    dtype = dtype or tensor.dtype
    size = tensor.numel() * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="graphwright-", delete=False) as file:
        path = Path(file.name)
        try:
            _reserve(file.fileno(), size)
            flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=dtype)
        finally:
            path.unlink()
    mapped = flat.view(tensor.shape)
    with torch.no_grad():
        mapped.copy_(tensor)
    return mapped


def _reserve(file: int, size: int) -> None:
    """Takes the room on the disk now: a full disk would kill whoever writes to the mapping."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def in_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by name, their floats in another dtype, in mapped files where that is possible.

    A tensor is in memory where the folder for temporary files has no room for it.
    """
    return {name: _converted(tensor, dtype) for name, tensor in weights.items()}


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype is dtype:
        return tensor
    if tensor.numel() * dtype.itemsize < SMALL:
        return tensor.to(dtype)
    try:
        return mapped_copy(tensor, dtype)
    except OSError:
        return tensor.to(dtype)


def new_tensors_mapped(before: Program, after: Program) -> Program:
    """`after` with the tensors that `before` lacks in mapped files, beyond `IN_MEMORY` bytes.

    Args:
        before: its tensors stay where they are.
        after: its large dense tensors on the CPU are moved; names, values and order stay.
    """
    known = {id(tensor) for tensor in before.state.values()}
    new = {id(t): t for t in after.state.values() if id(t) not in known and _can_move(t)}
    held, moved = 0, dict[int, Tensor]()
    for key, tensor in new.items():
        held += tensor.nbytes
        if held > IN_MEMORY:
            try:
                copy = mapped_copy(tensor.detach())
            except OSError:
                break
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[key] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
    if not moved:
        return after
    return after.replace(state={name: moved.get(id(t), t) for name, t in after.state.items()})


def is_mapped(tensor: Tensor) -> bool:
    """Whether the values lie in a mapped file."""
    return tensor.untyped_storage().filename is not None


def _can_move(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not is_plain or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_conj():
        return False
    is_whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
    return is_whole and tensor.nbytes >= SMALL and not is_mapped(tensor)
