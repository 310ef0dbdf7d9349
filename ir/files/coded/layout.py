"""Parts shared by all layouts of coded checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Form
from graphwright.ir.files.coded.rounding import Rounding


@dataclass(frozen=True)
class Layer:
    """A layer of a checkpoint.

    Attributes:
        form: of its weight.
        rounding: of its inputs; None where they stay as they are.
    """

    form: Form
    rounding: Rounding | None = None


class Layout(ABC):
    """The stored form of a checkpoint's layers, as its description says.

    Attributes:
        name: of the format, as in a message.
        parts: names of a layer's tensors behind the layer's own, the codes first.
        notes: what of the description is not followed, a line each.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.notes: list[str] = []

    def owners(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the layers in codes."""
        mark = f".{self.parts[0]}"
        return [name.removesuffix(mark) for name in tensors if name.endswith(mark)]

    @abstractmethod
    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        """One layer from its tensors.

        Raises:
            ModelError: a form that is not read.
            KeyError, IndexError, RuntimeError, ValueError: tensors are missing or do not fit.
        """

    def remarks(self) -> list[str]:
        """What the user should know once all layers are read, a line each."""
        return list(self.notes)

    def refuse(self, what: str, fix: str = "") -> ModelError:
        """The error for a form of this format that is not read."""
        return ModelError(f"{self.name} checkpoints {what} are not read", where=self.where, fix=fix)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""dtypes whose tensors are codes: they mean nothing without a scale."""


def group_order(g_idx: Tensor | None, inputs: int, block: int) -> Tensor | None:
    """The order (in,) int64 that sorts inputs by group; None where they are sorted.

    Raises:
        ModelError: groups that are not all of the block's size.
    """
    if g_idx is None or not g_idx.numel():
        return None
    wanted = torch.arange(inputs) // block
    if torch.equal(g_idx.long(), wanted):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], wanted):
        raise ModelError(f"g_idx does not make groups of {block} inputs")
    return order
