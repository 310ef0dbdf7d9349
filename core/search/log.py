"""The log of a search: what every candidate gave, on disk, so that none is run twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.atomic import write_atomically
from graphwright.job.environment import environment, own_code
from graphwright.job.keys import contents_of

if TYPE_CHECKING:
    from graphwright.specs.spec import Spec


def candidate_key(spec: Spec, surroundings: dict[str, Any]) -> str:
    """Digest of everything that the figures of a candidate depend on, bounds left aside.

    Args:
        spec: the candidate.
        surroundings: digest of the model, device, and what is measured.
    """
    from graphwright.specs.spec import resolve

    document = {key: value for key, value in resolve(spec).items() if key != "require"}
    named = contents_of(Path(spec.folder), document)
    parts = [document, named, environment(), own_code(), surroundings]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Log:
    """Rows by key of the candidate, one JSON line each; the file is replaced as a whole.

    A row of a candidate that failed at a time limit counts only under the same limit.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for line in lines:
            row = json.loads(line)
            self.rows[row["key"]] = row

    def find(self, key: str, limit: float | None) -> dict[str, Any] | None:
        """The row of a candidate that has been run, under this time limit in seconds."""
        row = self.rows.get(key)
        if row is not None and row["stopped_at"] is not None and row["stopped_at"] != limit:
            return None
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row: key, figures, seconds, failed, and the limit that it was stopped at."""
        self.rows[row["key"]] = row
        text = "".join(json.dumps(row) + "\n" for row in self.rows.values())
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, text.encode())
