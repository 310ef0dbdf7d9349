"""The part of a spec's `model` section that is about the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphwright.ir.errors import ModelError
from graphwright.ir.files.detect import Kind
from graphwright.ir.files.dtypes import DtypeChoice

CHECKPOINTS = (Kind.CHECKPOINT, Kind.CHECKPOINT_OLD, Kind.PICKLE)
"""Kinds whose weights may lie under a key."""

WEIGHTS_ALONE = (*CHECKPOINTS, Kind.SAFETENSORS, Kind.SAFETENSORS_INDEX)
"""Kinds that may hold weights without the model they belong to."""

WITH_GRAPH = (Kind.EXPORT, Kind.EXPORT_OLD, Kind.TORCHSCRIPT)
"""Kinds that hold a graph, dtypes included."""


@dataclass(frozen=True)
class Wanted:
    """The factory, the place of the weights, and the dtype.

    Attributes:
        factory, kwargs: they build the module.
        key, strip_prefix: place of the weights in the file.
        choice: of the dtype.
    """

    factory: str | None
    kwargs: Mapping[str, Any]
    key: str | None
    strip_prefix: str | None
    choice: DtypeChoice

    @classmethod
    def of(cls, section: Any, refusal: Callable[[str], str] | None) -> Wanted:
        """From the section, or a mapping with its keys; `refusal` as `load_model` takes it."""

        def entry(key: str) -> Any:
            is_mapping = isinstance(section, Mapping)
            return section.get(key) if is_mapping else getattr(section, key, None)

        choice = DtypeChoice(entry("dtype"))
        return cls(
            entry("factory"), entry("kwargs") or {}, entry("key"), entry("strip_prefix"),
            choice if refusal is None else replace(choice, refusal=refusal),
        )  # fmt: skip

    def check(self, path: Path, kind: Kind) -> None:
        """Refuses options that have no meaning for a kind of file.

        Raises:
            ModelError: `key` or `strip_prefix` is given for a file without such, or a factory for
                one that holds the model itself.
        """
        if self.factory is not None and kind not in WEIGHTS_ALONE:
            raise ModelError(
                f"model.factory builds the model of a file of weights, and this is {kind.value}",
                where=str(path),
                fix="Take it out of the spec.",
            )
        if self.key is not None and kind not in CHECKPOINTS:
            raise ModelError(
                f"model.key names a part of a training checkpoint, and this is {kind.value}",
                where=str(path),
                fix="Take it out of the spec.",
            )
        if self.strip_prefix is not None and kind in (*WITH_GRAPH, Kind.GGUF):
            raise ModelError(
                f"model.strip_prefix is for files of weights, and this is {kind.value}",
                where=str(path),
                fix="Take it out of the spec.",
            )
