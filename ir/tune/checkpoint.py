"""The state of a training run on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphwright.ir.kept import Warn, keep, kept

SHARE_OF_TIME = 0.05
"""Of the training time at most that goes into checkpoints."""

_WHAT = "the state of training"


@dataclass
class Checkpoint:
    """One file that is replaced as a whole.

    Attributes:
        folder: where; None for no checkpoints.
        stem: name of the file.
        key: digest of all that the run depends on; a file with another one counts as none.
        interval: seconds between two at least; more where writing takes long, 0 for every step.
    """

    folder: Path | None
    stem: str
    key: str
    interval: float
    warn: Warn
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    @property
    def is_due(self) -> bool:
        """Whether enough work has been done since the last one."""
        if self.folder is None:
            return False
        least = max(self.interval, self._cost / SHARE_OF_TIME) if self.interval else 0.0
        return time.monotonic() - self._last >= least

    def save(self, state: dict[str, Any]) -> None:
        """Writes tensors, numbers, texts, and lists and dicts of them."""
        if self.folder is None:
            return
        begin = time.monotonic()
        keep(self.folder, self.stem, {"key": self.key, "state": state}, _WHAT, self.warn)
        self._last = time.monotonic()
        self._cost = self._last - begin

    def load(self) -> dict[str, Any] | None:
        """The state that a run with the same key saved; None if there is none.

        A stale file counts as none, and so does a damaged one, which is told.
        """
        if self.folder is None:
            return None
        found = kept(self.folder, self.stem, _WHAT, self.warn)
        return dict(found["state"]) if found is not None and found["key"] == self.key else None


def make_key(**parts: Any) -> str:
    """Digest of named facts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
