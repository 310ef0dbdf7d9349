"""A table of samples, cut into batches."""

from __future__ import annotations

from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature


def wanted_samples(data: str, samples: int | None, available: int) -> int:
    """The number of samples to take.

    Raises:
        ArgumentError: there are fewer than were asked for, or none.
    """
    if available == 0:
        raise ArgumentError("holds no samples", where=data)
    if samples is not None and samples > available:
        raise ArgumentError(f"holds {available} samples, {samples} were asked for", where=data)
    return available if samples is None else samples


def pieces_of(data: str, signature: Signature, count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch; a rest smaller than the model takes is left out."""
    first = next((s.shape[0] for s in signature.inputs if s.shape), size)
    least = first if isinstance(first, int) else signature.dims.get(first, DimRange()).min
    spans = [(start, min(start + size, count)) for start in range(0, count, size)]
    pieces = [(start, stop) for start, stop in spans if stop - start >= least]
    if not pieces:
        raise ArgumentError(
            f"holds {count} samples, and the model takes batches of {least} or more", where=data
        )
    return pieces
