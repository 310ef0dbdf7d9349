"""Finished layers of a walk on disk, so that a killed run solves none of them twice."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphwright.ir.atomic import replacing
from graphwright.ir.context import Context
from graphwright.ir.graph.digest import digest
from graphwright.ir.program import Program

if TYPE_CHECKING:
    from graphwright.ir.calibration.site import Solved


FIELDS = ("weight", "bias", "grid", "state", "info")


@dataclass(frozen=True)
class LayerStore:
    """A folder with one file per finished layer; without a folder it keeps nothing."""

    folder: Path | None

    @classmethod
    def of(cls, context: Context, program: Program, method: Any) -> LayerStore:
        """The store of this work: a run with other data, options or weights finds another."""
        if context.work is None or not context.key:
            return cls(None)
        parts = [context.key, digest(program), str(context.seed), repr(context.scope),
                 type(method).__qualname__, torch.__version__]  # fmt: skip
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return cls(context.work / f"layers-{key[:16]}")

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.pt"

    def load(self, name: str) -> Solved | None:
        """The result that was kept for a layer; a damaged file counts as none."""
        from graphwright.ir.calibration.site import Solved

        if self.folder is None:
            return None
        try:
            # weights_only: a restricted unpickler, which can run no code
            found = torch.load(self._path(name), map_location="cpu", weights_only=True)
            return Solved(**{key: found[key] for key in FIELDS})
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            return None

    def save(self, name: str, solved: Solved) -> None:
        """Keeps what was found."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {key: getattr(solved, key) for key in FIELDS}
        with replacing(self._path(name)) as file:
            torch.save(content, file)
