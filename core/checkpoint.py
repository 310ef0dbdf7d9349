"""Programs between passes, kept so that a killed run goes on after the last finished pass."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.files import write_atomically

if TYPE_CHECKING:
    from graphwright.ir.program import Program


def chain_key(previous: str, **parts: Any) -> str:
    """Key of a step: a digest of everything that its result depends on."""
    text = json.dumps([previous, parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """A folder with at most one program: that of the last finished pass worth keeping."""

    folder: Path

    def load(self, keys: list[str]) -> tuple[int, Program, list[dict[str, Any]]] | None:
        """(index, program, records so far) of the stored step among `keys`; None if there is none.

        A stale or damaged checkpoint counts as none: it is never worth an error.
        """
        from graphwright.ir.archive import load_program
        from graphwright.ir.errors import GraphwrightError

        manifest = self.folder / "manifest.json"
        try:
            entry = json.loads(manifest.read_text())
            index = keys.index(entry["key"])
            file = self.folder / entry["file"]
            if file_sha256(file) != entry["sha256"]:
                return None
            return index, load_program(file), entry["records"]
        except (OSError, ValueError, KeyError, TypeError, GraphwrightError):
            return None

    def save(self, index: int, key: str, program: Program, records: list[dict[str, Any]]) -> None:
        """Stores a step; the manifest is written last, so a kill leaves the old one or this."""
        from graphwright.ir.archive import save_program

        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{index:03d}-{key[:16]}.pt2"
        file = self.folder / name
        save_program(program, file)
        entry = {"key": key, "file": name, "sha256": file_sha256(file), "records": records}
        write_atomically(self.folder / "manifest.json", json.dumps(entry).encode())
        for old in self.folder.glob("*.pt2"):
            if old.name != name:
                old.unlink()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
