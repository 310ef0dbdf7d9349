"""Finished layers of a walk on disk, so that a killed run solves none of them twice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphwright.ir.context import Context
from graphwright.ir.graph.digest import digest
from graphwright.ir.kept import Warn, keep, kept
from graphwright.ir.program import Program

if TYPE_CHECKING:
    from graphwright.ir.calibration.site import Solved


FIELDS = ("weight", "bias", "grid", "state", "info")


@dataclass(frozen=True)
class LayerStore:
    """A folder with one file per finished layer; without a folder it keeps nothing.

    Attributes:
        folder: where. warn: told of a file that cannot be written, or was damaged.
    """

    folder: Path | None
    warn: Warn

    @classmethod
    def of(cls, context: Context, program: Program, method: Any) -> LayerStore:
        """The store of this work: a run with other data, options or weights finds another."""
        if context.work is None or not context.key:
            return cls(None, context.warn)
        parts = [context.key, digest(program), str(context.seed), repr(context.scope),
                 type(method).__qualname__, torch.__version__]  # fmt: skip
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return cls(context.work / f"layers-{key[:16]}", context.warn)

    def load(self, name: str) -> Solved | None:
        """The result that was kept for a layer; a damaged file counts as none, and is told."""
        from graphwright.ir.calibration.site import Solved

        if self.folder is None:
            return None
        found = kept(self.folder, _stem(name), f"layer {name!r}", self.warn)
        return None if found is None else Solved(**{key: found[key] for key in FIELDS})

    def save(self, name: str, solved: Solved) -> None:
        """Keeps what was found."""
        if self.folder is None:
            return
        content = {key: getattr(solved, key) for key in FIELDS}
        keep(self.folder, _stem(name), content, "a finished layer", self.warn)


def _stem(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]
