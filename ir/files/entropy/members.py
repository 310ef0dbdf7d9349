"""Members of an archive that hold streams in the place of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.entropy.coder import BrokenStreamError
from graphwright.ir.files.entropy.stream import FACT, coded, decoded, refusal

PREFIX = "circuit_"
"""What the names of such members begin with, where others say `weight_`."""


@dataclass(frozen=True)
class Coding:
    """The settings of `store.entropy`, as a program's facts hold them."""

    latent: int
    smallest: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Coding | None:
        """The settings; None where the program is to be written plainly.

        Raises:
            ArgumentError: the record is none.
        """
        if FACT not in facts:
            return None
        record = facts[FACT]
        values = [record.get(k) for k in ("latent", "smallest")] if isinstance(record, dict) else []
        if len(values) != 2 or not all(type(v) is int and v > 0 for v in values):
            raise ArgumentError(
                f"the record of {FACT} is {record!r}, and has to hold whole numbers `latent` and "
                "`smallest`",
                fix=f"Run {FACT} again.",
            )
        return cls(record["latent"], record["smallest"])

    def stream(self, tensor: Tensor) -> bytes | None:
        """The stream of a tensor; None where it is written as it is."""
        if tensor.is_floating_point() or not tensor.is_contiguous():
            return None
        values = tensor.detach().cpu().numpy() if tensor.dtype.itemsize == 1 else None
        if values is None or refusal(values, self.smallest):
            return None
        found = coded(values, self.latent)
        return None if found is None else found.stream


def read(data: bytes, dtype: torch.dtype, shape: list[int], where: str) -> Tensor:
    """The tensor of a stream.

    Raises:
        ModelError: the stream is damaged, or none of such a tensor.
    """
    try:
        if dtype not in (torch.int8, torch.uint8):
            raise BrokenStreamError(f"{dtype} is never coded")
        like = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(decoded(data, like, shape))
    except BrokenStreamError as error:
        raise ModelError(
            "its entropy-coded bytes are damaged",
            where=where,
            details=(str(error),),
            fix="Get the file again, or save the program anew.",
        ) from error
