"""Finds stored tensors that somebody wrote into; programs share tensors and never do."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from graphwright.ir.program import Program

WORDS = 1 << 10
"""Words of 8 bytes that are summed up apart; a value that moves from one to another shows."""


class Writes:
    """What the tensors of some programs held when this was made.

    A fingerprint is a sum over the bits, at the speed of memory, and torch's own count of writes,
    which sees what goes through torch; not `digest`, which would cost a pass more than its work.

    Args:
        programs: whose stored tensors and example inputs are watched; one that several share is
            looked at once.
    """

    def __init__(self, programs: Iterable[Program]) -> None:
        named = {id(t): (name, t) for program in programs for name, t in _tensors(program)}
        self.watched = [(name, t, _fingerprint(t)) for name, t in named.values()]

    def found(self) -> list[str]:
        """Names of the tensors that hold something else now."""
        return [name for name, tensor, print in self.watched if _fingerprint(tensor) != print]


def _tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    yield from program.state.items()
    for spec, tensor in zip(program.signature.inputs, program.examples, strict=True):
        yield f"example of {spec.name}", tensor


def _fingerprint(tensor: Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not data.numel():
        return version, 0
    raw = data.view(torch.uint8)
    whole = raw.numel() // (8 * WORDS) * (8 * WORDS)
    sums = raw[:whole].clone() if raw.data_ptr() % 8 else raw[:whole]
    columns = sums.view(torch.int64).view(-1, WORDS).sum(0)
    rest = zlib.crc32(raw[whole:].cpu().numpy().tobytes())
    return version, zlib.crc32(columns.cpu().numpy().tobytes(), rest)
