"""The state of a training run on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.atomic import replacing

SHARE_OF_TIME = 0.05
"""Of the training time at most that goes into checkpoints."""


@dataclass
class Checkpoint:
    """One file that is replaced as a whole.

    Attributes:
        path: where; None for no checkpoints.
        key: digest of all that the run depends on; a file with another one counts as none.
        interval: seconds between two at least; more where writing takes long, 0 for every step.
    """

    path: Path | None
    key: str
    interval: float
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    @property
    def is_due(self) -> bool:
        """Whether enough work has been done since the last one."""
        if self.path is None:
            return False
        least = max(self.interval, self._cost / SHARE_OF_TIME) if self.interval else 0.0
        return time.monotonic() - self._last >= least

    def save(self, state: dict[str, Any]) -> None:
        """Writes tensors, numbers, texts, and lists and dicts of them."""
        if self.path is None:
            return
        begin = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            torch.save({"key": self.key, "state": state}, file)
        self._last = time.monotonic()
        self._cost = self._last - begin

    def load(self) -> dict[str, Any] | None:
        """The state that a run with the same key saved; None if there is none.

        A stale or damaged file counts as none: it is never worth an error.
        """
        if self.path is None:
            return None
        try:
            # weights_only: a restricted unpickler, which can run no code
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            return dict(found["state"]) if found["key"] == self.key else None
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            return None


def make_key(**parts: Any) -> str:
    """Digest of named facts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
